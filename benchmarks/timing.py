"""How things are timed: contenders in turn, round after round, so that a busy moment of the machine hits them alike.

A turn is two runs, of which the second counts: in use a run follows one of its own kind, not another contender's that
has emptied the caches. Each round begins with another contender.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

#: A timer makes one run and says how many seconds it took.
Timer = Callable[[], float]


class Timing(NamedTuple):
    """Milliseconds of one run: the median, and the 20 % and 80 % percentiles."""

    median_ms: float
    low_ms: float
    high_ms: float


def timer(run: Callable[[], object], device: str) -> Timer:
    """The timer of a function that works on a device ("cpu", "cuda")."""
    return functools.partial(_cuda_seconds if device == "cuda" else _wall_seconds, run)


def side_by_side(timers: Mapping[str, Timer], *, rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Time all contenders alternately."""
    for _ in range(warmup):
        for run in timers.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    names = list(timers)
    for index in range(rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            timers[name]()
            seconds[name].append(timers[name]())
    return {name: summary(values) for name, values in seconds.items()}


def summary(seconds: list[float]) -> Timing:
    """Median and spread of some runs; of a single run, three times that."""
    if len(seconds) == 1:
        return Timing(*[round(1000 * seconds[0], 4)] * 3)
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(*(round(1000 * value, 4) for value in (statistics.median(seconds), fifths[0], fifths[3])))


def _wall_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], object]) -> float:
    """Seconds between two events around ``run``, with an L2 cache that holds nothing of the run before."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # The flush also keeps the device busy while Python queues the first kernels, so launches do not count as work
    # unless the device has to wait for them, as it would in training.
    _flush_buffer().zero_()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


@functools.lru_cache(maxsize=1)
def _flush_buffer() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")  # several times the L2 cache of any GPU so far
