"""How things are timed here: alternating runs of all contenders in one process, medians and spread, a JSON record."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Milliseconds of one call: the median, and the 20 % and 80 % quantiles."""

    median_ms: float
    low_ms: float
    high_ms: float


def side_by_side(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2
) -> dict[str, Timing]:
    """Time all contenders in turn, round after round, so that a busy moment of the machine hits them alike."""
    for _ in range(warmup):
        for contender in contenders.values():
            contender()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(seconds: list[float]) -> Timing:
    fifths = statistics.quantiles(seconds, n=5)
    return Timing(*(round(1000 * value, 2) for value in (statistics.median(seconds), fifths[0], fifths[3])))


def machine() -> dict[str, Any]:
    """Where and with what a timing was taken."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return {
        "cpu": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "saelab": metadata.version("saelab"),
        "command": "python -m " + " ".join([f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def publish(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return path
