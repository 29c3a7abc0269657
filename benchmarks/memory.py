"""The most memory that a run holds beyond what was there before it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Bytes held at the peak of ``run``, above what was held before. None where the system cannot tell.

    On a GPU what torch's allocator handed out. On a CPU resident memory of the process, in whatever way it was
    allocated (Linux: writing 5 to clear_refs resets the high-water mark); so pages that freed memory of an earlier run
    still holds are given back to the system first, else they would be used again without being seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _CLEAR.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:  # some sandboxes forbid it; a missing figure is better than a wrong one
        return None
    before = _status_bytes("VmRSS")
    run()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])
