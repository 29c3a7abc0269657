"""numpy on all cores: its loops release Python's lock, so threads that work on different rows run side by side."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def spread(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """``[function(item) for item in items]`` on as many threads as torch uses; ``function`` should be numpy's work."""
    items = list(items)
    n_threads = min(torch.get_num_threads(), len(items))
    if n_threads < 2:
        return [function(item) for item in items]
    return list(_pool(n_threads, os.getpid()).map(function, items))


@functools.lru_cache(maxsize=4)
def _pool(n_threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads are not inherited by a forked process: it needs a pool of its own."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="saelab-kernels")
