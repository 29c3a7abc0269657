"""The record of a benchmark: rows with the device, the versions and the command that made them, as JSON."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PLACES = ("--peer-python", "--out", "--workspace")
TOPICS = ("ops", "train", "search", "quality")


def machine(device: str) -> dict[str, Any]:
    """Where and with what a timing was taken."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "saelab": _version("saelab"),
    }


def publish(
    topic: str, device: str, rows: list[dict[str, Any]], *, out: Path, smoke: bool = False, **facts: object
) -> Path:
    """Write ``OUT/TOPIC_DEVICE.json``, in place of an older one. ``facts`` hold for all rows."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{topic}_{device}.json"
    record = {
        "topic": topic,
        "device": device,
        "smoke": smoke,
        "command": shlex.join(["python", "-m", "benchmarks", *_without_places(sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(device),
        **facts,
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def read(directory: Path = RESULTS) -> list[dict[str, Any]]:
    """All records of a directory, by topic in the order of TOPICS, then by device."""
    records = [json.loads(path.read_text("utf-8")) for path in sorted(directory.glob("*_*.json"))]
    return sorted(records, key=lambda record: (TOPICS.index(record["topic"]), record["device"]))


def _without_places(arguments: list[str]) -> list[str]:
    """The arguments without those that say where things lie on this machine."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in _PLACES:
            next(words, None)
        elif word.split("=")[0] not in _PLACES:
            kept.append(word)
    return kept


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # saelab need not be installed where only kernels are timed
        return None


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
