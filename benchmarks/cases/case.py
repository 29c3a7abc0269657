"""One operation at one shape, ready to be checked and timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.floors import Floor

#: Error of a float32 result from the same inputs: rounding of sums of some thousand terms.
FLOAT32 = 1e-5
#: Error that a result may have for being timed as an alternative. It only keeps nonsense out: products in bfloat16
#: choose other features at the border.
ALTERNATIVE = 0.2


@dataclass(frozen=True)
class Case:
    """``ours`` and ``alternatives`` return results of the same form, which ``error`` compares with the reference."""

    op: str
    what: str
    """"forward", "forward + backward" or "in place"."""
    ours: Callable[[], Any]
    alternatives: Mapping[str, Callable[[], Any]]
    error: Callable[[Any], float]
    """Of a result at full size, against the op's reference on a sample of tokens or features, in float64."""
    floor: Floor
    tolerance: float = FLOAT32
    reset: Callable[[], None] = lambda: None
    """Called before a result is made that will be checked, for operations in place."""
