"""The sizes that are timed: N tokens a batch, d width, F features, k active features a token."""

from __future__ import annotations

import re
from typing import NamedTuple


class Shape(NamedTuple):
    """One problem size."""

    tokens: int
    width: int
    features: int
    k: int

    def __str__(self) -> str:
        return f"{self.tokens}x{self.width}x{self.features}k{self.k}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``NxdxFkK``, as ``str`` writes it.

        Raises:
            ValueError: it does not look like that, or k exceeds F.
        """
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)k(\d+)", text)
        if not match:
            raise ValueError(f"a shape is TOKENSxWIDTHxFEATURESkK, such as 2048x576x4608k32; got {text!r}")
        shape = cls(*map(int, match.groups()))
        if min(shape) < 1 or shape.k > shape.features:
            raise ValueError(f"{text}: sizes start at 1, and k is at most the number of features")
        return shape

    @property
    def n_dead(self) -> int:
        """The features that count as dead where AuxK is timed: 5 %."""
        return max(1, self.features // 20)

    @property
    def k_aux(self) -> int:
        """Dead features a token that AuxK uses: half the width, as far as there are so many."""
        return min(self.n_dead, max(1, self.width // 2))


#: What two CPU cores can do in a second or less; widths and sizes of a small and a middling language model's SAE.
CPU = (Shape(2048, 576, 4608, 32), Shape(1024, 768, 16384, 64))

#: Whole steps on a GPU.
GPU_STEPS = (Shape(8192, 2304, 65536, 64), Shape(8192, 768, 65536, 64), Shape(8192, 768, 16384, 64))

#: Single operations on a GPU: the table of floors that the kernels are designed by, in the order of what is claimed, as
#: time may run out. What does not fit the device's memory is left out with a line that says so.
GPU = (
    Shape(8192, 2304, 65536, 64),
    Shape(8192, 768, 65536, 64),
    Shape(8192, 768, 262144, 64),
    Shape(8192, 2304, 262144, 64),
    Shape(8192, 768, 16384, 64),
    Shape(8192, 2304, 65536, 32),
    Shape(8192, 2304, 65536, 128),
    Shape(8192, 2304, 16384, 64),
    Shape(8192, 4096, 16384, 64),
    Shape(8192, 4096, 65536, 64),
    Shape(8192, 768, 1048576, 64),
    Shape(8192, 4096, 262144, 64),
    Shape(8192, 2304, 1048576, 64),
    Shape(8192, 4096, 1048576, 64),
)

#: Tiny, to try every line of the benchmarks in seconds. Their times mean nothing.
SMOKE = (Shape(48, 32, 256, 8),)


#: Search: tokens are those of a chunk.
SEARCH = {"cpu": (Shape(2048, 576, 16384, 32),), "cuda": (Shape(8192, 768, 16384, 32), Shape(8192, 2304, 65536, 64))}


def default(device: str, topic: str, *, smoke: bool = False) -> tuple[Shape, ...]:
    """The shapes of a topic ("ops", "train", "search", "quality") on a device ("cpu", "cuda") if none are asked for."""
    if smoke:
        return SMOKE
    if topic == "search":
        return SEARCH[device]
    if device == "cpu":
        return CPU
    return GPU if topic == "ops" else GPU_STEPS
