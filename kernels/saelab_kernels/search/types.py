"""What a search keeps: the best pairs of each group, histogram counts and sums. All of it can be added up in any order.

A group is a feature, or a bin of a feature's activations; G groups, m places in each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

#: Exponents of float32 that share one integer in ``Tally.sums``, and how many integers that makes.
EXPONENTS_PER_SUM = 8
N_SUMS = 32

#: Mantissa bits of float32.
MANTISSA = 23


class Firings(NamedTuple):
    """P pairs: a feature (or another group) that is active, where, and how much. A position is one token of all data
    that is ever searched; a group meets it at most once."""

    features: Tensor  # int64 [P]
    positions: Tensor  # int64 [P], at least 0
    values: Tensor  # float32 [P], positive; or int64 [P]


class TopState(NamedTuple):
    """The m pairs of each group with the highest value, the lower position first among equals: a total order."""

    values: Tensor  # float32 or int64 [G, m], descending; ``nothing(dtype)`` where the place is empty
    positions: Tensor  # int64 [G, m]; -1 where the place is empty
    threshold: Tensor  # [G]: the last column of ``values``, which a new pair must reach

    def clone(self) -> TopState:
        """A copy to change in place."""
        return TopState(*(tensor.clone() for tensor in self))

    def kept(self) -> Firings:
        """The pairs in the state, by group."""
        groups, places = (self.positions >= 0).nonzero(as_tuple=True)
        return Firings(groups, self.positions[groups, places], self.values[groups, places])


class Tally(NamedTuple):
    """Integers only, so that it does not depend on the order in which pairs were counted."""

    counts: Tensor  # int32 [F, n_bins]: up to 2^31 firings in a bin
    sums: Tensor  # int64 [F, 32]: the sum of those values whose exponent lies in 8 b .. 8 b + 7, times 2^(150 - 8 b)

    @property
    def n_fired(self) -> Tensor:
        """Firings of each feature, int64 [F]; bins at the ends take what lies beyond, so that none is lost."""
        return self.counts.sum(1)

    def means(self) -> Tensor:
        """Mean value of each feature, float64 [F], exact but for a few roundings of float64; 0 for a silent one.

        A float32 is (2^23 + mantissa) 2^(exponent - 150); the sums of the integers (2^23 + mantissa) 2^(exponent mod 8)
        are exact up to 2^32 firings of a feature.
        """
        total = torch.zeros(len(self.sums), dtype=torch.float64, device=self.sums.device)
        for bucket in range(N_SUMS - 1, -1, -1):  # a fixed order, so that the same integers give the same bits
            total += self.sums[:, bucket].double() * math.ldexp(1.0, EXPONENTS_PER_SUM * bucket - 150)
        return total / self.n_fired.clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Bins of equal ratio, cut from the leading bits of float32: no maximum needs to be known beforehand.

    Within an octave, [2^e, 2^(e+1)), they have equal width. The first bin takes all below it, the last all above.
    """

    per_octave: int = 32
    """A power of two, at most 2^23. A quantile read from 32 bins an octave is off by at most 1.6 % (half a bin)."""
    lowest: int = -6
    """The first bin begins at 2^lowest."""
    n_octaves: int = 16

    def __post_init__(self) -> None:
        bits = self.per_octave.bit_length() - 1
        if self.per_octave < 1 or self.per_octave != 1 << bits or bits > MANTISSA:
            raise ValueError(f"per_octave must be a power of two between 1 and 2^23, got {self.per_octave}")
        if self.n_octaves < 1 or self.lowest < -126 or self.lowest + self.n_octaves > 128:
            raise ValueError(
                f"the octaves must lie within float32's 2^-126..2^128, got {self.n_octaves} from 2^{self.lowest}"
            )

    @property
    def n_bins(self) -> int:
        return self.per_octave * self.n_octaves

    @property
    def shift(self) -> int:
        """A float32's bits moved down by this, minus ``first``, are its bin."""
        return MANTISSA - (self.per_octave.bit_length() - 1)

    @property
    def first(self) -> int:
        return (127 + self.lowest) * self.per_octave

    def of(self, values: Tensor) -> Tensor:
        """The bin of each positive float32, int64."""
        bits = values.float().contiguous().view(torch.int32).long()
        return ((bits >> self.shift) - self.first).clamp_(0, self.n_bins - 1)

    def lower_edge(self, index: Tensor) -> Tensor:
        """Where the bins ``index`` begin, float32 of the same shape; bin 0 is taken to begin at 2^lowest."""
        bits = (index + self.first) << self.shift
        return bits.to(torch.int32).view(torch.float32)


def empty_top(n_groups: int, m: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TopState:
    """No pair yet."""
    return TopState(
        values=torch.full((n_groups, m), nothing(dtype), dtype=dtype, device=device),
        positions=torch.full((n_groups, m), -1, dtype=torch.int64, device=device),
        threshold=torch.full((n_groups,), nothing(dtype), dtype=dtype, device=device),
    )


def empty_tally(n_features: int, bins: Bins, *, device: str = "cpu") -> Tally:
    """Nothing counted yet."""
    return Tally(
        counts=torch.zeros(n_features, bins.n_bins, dtype=torch.int32, device=device),
        sums=torch.zeros(n_features, N_SUMS, dtype=torch.int64, device=device),
    )


def nothing(dtype: torch.dtype) -> int:
    """The value of an empty place, below every real one: 0 among activations, which are positive."""
    return 0 if dtype == torch.float32 else torch.iinfo(torch.int64).min
