"""One pass over the firings of all features: chunk after chunk in any order, bounded memory, one exact result.

A chunk's pairs first meet the thresholds; of random tokens a feature's n-th firing is among its m best with probability
m / n, so soon few pass. Those wait in a buffer until a merge is worth it, which raises the thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from saelab_kernels import search
from saelab_kernels.search.hashing import feature_hash_bits
from saelab_kernels.search.types import Bins, Firings, Tally, TopState, empty_tally, empty_top

#: Pairs that wait for a merge, at least and at most: the costs of a merge grow with the touched groups, and what passes
#: an old threshold in the meantime would not pass the new one. 2^20 pairs are 24 MB.
_LEAST, _MOST = 1 << 15, 1 << 20


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What is kept of every feature."""

    n_top: int
    """Highest activations."""
    row_length: int | None = None
    """Positions of a row. If given, each row (``position // row_length``) has at most one place among a feature's top
    activations, its highest; a row must come whole, in one call of ``add``."""
    bins: Bins = field(default_factory=Bins)
    """Of the histogram."""
    group: int = 16
    """Neighbouring bins that are sampled together; a power of two."""
    n_sampled: int = 0
    """Firings drawn from each such group."""
    seed: int = 0
    """Of the draw."""

    @property
    def n_groups(self) -> int:
        return self.bins.n_bins // self.group


class Found(NamedTuple):
    """What a search knows so far. Shares memory with the search."""

    top: TopState  # [F, n_top]
    tally: Tally
    sample: TopState  # [F * n_groups, n_sampled], values are priorities


class FeatureSearch:
    """State of a pass. ``add`` chunks, ``combine`` with the state of other data, then read ``found``."""

    def __init__(self, n_features: int, settings: SearchSettings, *, device: str = "cpu") -> None:
        self.settings = settings
        self.n_features = n_features
        self._hashes = feature_hash_bits(settings.seed, n_features, torch.device(device))
        n_groups = n_features * settings.n_groups if settings.n_sampled else 0
        self._tally = empty_tally(n_features, settings.bins, device=device)
        self._top = _Buffered(empty_top(n_features, settings.n_top, device=device))
        self._sample = _Buffered(empty_top(n_groups, max(settings.n_sampled, 1), dtype=torch.int64, device=device))

    def add(self, features: Tensor, positions: Tensor, values: Tensor) -> None:
        """Take the pairs of a chunk: features and positions int64 [P], values float32 [P].

        A feature meets a position once in all data.

        Raises:
            TypeError, ValueError: as ``scan_top``.
            ValueError: a value that is not a positive, finite number.
        """
        _check_values(values)
        settings = self.settings
        drawn = search.hist_sample(
            features,
            positions,
            values,
            tally=self._tally,
            bins=settings.bins,
            feature_hash=self._hashes if settings.n_sampled else None,
            group=settings.group,
        )
        if drawn is not None:
            self._sample.take(self._sample.passing(drawn))
        passing = self._top.passing(Firings(features, positions, values))
        if settings.row_length is not None:
            # a row whose highest pair passes the threshold is judged by it; of any other row nothing passes
            passing = search.row_peaks(*passing, row_length=settings.row_length)
        self._top.take(passing)

    def found(self) -> Found:
        """What all chunks so far amount to."""
        return Found(self._top.merged(), self._tally, self._sample.merged())

    def combine(self, other: FeatureSearch) -> None:
        """Take what ``other`` found in other data: the result is that of one search over both.

        Raises:
            ValueError: ``other`` was asked for something else.
        """
        if (other.n_features, other.settings) != (self.n_features, self.settings):
            raise ValueError(f"cannot combine searches with {self.settings} and {other.settings}; search alike")
        found = other.found()
        self._top.take(found.top.kept())
        self._sample.take(found.sample.kept())
        for mine, theirs in zip(self._tally, found.tally, strict=True):
            mine += theirs

    def tensors(self) -> dict[str, Tensor]:
        """The state for a checkpoint, on the CPU; empty places of the sample are left out."""
        found = self.found()
        sampled = found.sample.kept()
        named = {
            "top.values": found.top.values,
            "top.positions": found.top.positions,
            "tally.counts": found.tally.counts,
            "tally.sums": found.tally.sums,
            "sample.groups": sampled.features,
            "sample.positions": sampled.positions,
            "sample.values": sampled.values,
        }
        return {name: tensor.cpu().contiguous() for name, tensor in named.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from ``tensors``, in a new search with the same features and settings.

        Raises:
            ValueError: they are those of other settings.
        """
        mine = self.found()
        for name, target in (("top.values", mine.top.values), ("tally.counts", mine.tally.counts)):
            if tensors[name].shape != target.shape:
                found, wanted = list(tensors[name].shape), list(target.shape)
                raise ValueError(f"{name} has shape {found} instead of {wanted}; the state is of another search")
        device = self._hashes.device
        at = {name: tensor.to(device) for name, tensor in tensors.items()}
        for target, name in zip(mine.tally, ("counts", "sums"), strict=True):
            target.copy_(at[f"tally.{name}"])
        mine.top.values.copy_(at["top.values"])
        mine.top.positions.copy_(at["top.positions"])
        mine.top.threshold.copy_(at["top.values"][:, -1])
        self._sample.take(Firings(at["sample.groups"], at["sample.positions"], at["sample.values"]))


class _Buffered:
    """A ``TopState`` and the pairs that wait for their merge."""

    def __init__(self, state: TopState) -> None:
        self.state = state
        self._waiting: list[Firings] = []
        self._n_waiting = 0
        self._enough = min(max(state.values.numel() // 2, _LEAST), _MOST)

    def passing(self, pairs: Firings) -> Firings:
        return search.scan_top(*pairs, self.state.threshold)

    def take(self, pairs: Firings) -> None:
        self._waiting.append(pairs)
        self._n_waiting += len(pairs.features)
        if self._n_waiting >= self._enough:
            self.merged()

    def merged(self) -> TopState:
        """The state with nothing waiting."""
        if self._waiting:
            search.merge_top_(self.state, *(torch.cat(parts) for parts in zip(*self._waiting, strict=True)))
        self._waiting, self._n_waiting = [], 0
        return self.state


def _check_values(values: Tensor) -> None:
    if values.dtype == torch.float32 and len(values):
        # as integers the bits of positive finite numbers are 1 .. 0x7F7FFFFF; one pass, and NaN cannot hide
        low, high = torch.aminmax(values.contiguous().view(torch.int32))
        if low < 1 or high > 0x7F7FFFFF:
            raise ValueError("activations to search must be positive, finite numbers; NaN, infinity or others came")
