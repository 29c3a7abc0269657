"""Reading ahead: while the caller works on one thing, the next is made ready in the background."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """``make(number)`` for numbers asked for in increasing order, each made while the one before is in use.

    Everything is made in one thread of its own, also what has to be waited for, so that ``make`` needs no lock and
    gives the same bits whether or not it was early.
    """

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._next: tuple[int, Future[T]] | None = None

    def get(self, number: int, *, ahead: bool = True) -> T:
        """The thing with this number; with ``ahead`` the next one is begun."""
        if self._next is not None and self._next[0] == number:
            future = self._next[1]
        else:
            if self._next is not None:
                self._next[1].cancel()  # nobody will ask for it; if it is being made it cannot be stopped
            future = self._thread.submit(self._make, number)
        made = future.result()
        self._next = (number + 1, self._thread.submit(self._make, number + 1)) if ahead else None
        return made
