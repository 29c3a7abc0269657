"""Definition of a search over all features' firings: sorts and index arithmetic, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab_kernels.search.hashing import priorities
from saelab_kernels.search.types import EXPONENTS_PER_SUM, MANTISSA, N_SUMS, Bins, Firings, Tally, TopState


def scan_top(features: Tensor, positions: Tensor, values: Tensor, threshold: Tensor) -> Firings:
    """The pairs whose value reaches the threshold of their group, in order. Equality stays: its position may win."""
    kept = values >= threshold[features]
    return Firings(features[kept], positions[kept], values[kept])


def merge_top_(state: TopState, features: Tensor, positions: Tensor, values: Tensor) -> TopState:
    """The m best of the old and new pairs of each group, in place."""
    both = (torch.cat(parts) for parts in zip(state.kept(), (features, positions, values), strict=True))
    features, positions, values = sorted_best_first(*both)
    m = state.values.shape[1]
    starts = torch.searchsorted(features, torch.arange(len(state.threshold), device=features.device))
    rank = torch.arange(len(features), device=features.device) - starts[features]
    kept = rank < m
    state.values[features[kept], rank[kept]] = values[kept]
    state.positions[features[kept], rank[kept]] = positions[kept]
    state.threshold.copy_(state.values[:, m - 1])
    return state


def sorted_best_first(features: Tensor, positions: Tensor, values: Tensor) -> Firings:
    """By group, then by descending value, then by position: three stable sorts, the one that decides first is last."""
    order = torch.sort(positions).indices
    order = order[torch.sort(values[order], stable=True, descending=True).indices]
    order = order[torch.sort(features[order], stable=True).indices]
    return Firings(features[order], positions[order], values[order])


def hist_sample(
    features: Tensor,
    positions: Tensor,
    values: Tensor,
    tally: Tally,
    bins: Bins,
    feature_hash: Tensor | None,
    group: int,
) -> Firings | None:
    """Count the pairs in ``tally``, in place; group and priority of each for a sample, if ``feature_hash`` is given.

    ``group`` neighbouring bins form one group; groups are numbered feature by feature.
    """
    index = bins.of(values)
    tally.counts.view(-1).index_add_(
        0, features * bins.n_bins + index, torch.ones(1, dtype=torch.int32, device=values.device).expand(len(values))
    )
    bits = values.contiguous().view(torch.int32).long()
    exponents = bits >> MANTISSA
    mantissas = (bits & ((1 << MANTISSA) - 1)) | (1 << MANTISSA)
    buckets = features * N_SUMS + exponents // EXPONENTS_PER_SUM
    tally.sums.view(-1).index_add_(0, buckets, mantissas << (exponents % EXPONENTS_PER_SUM))
    if feature_hash is None:
        return None
    groups = features * (bins.n_bins // group) + index // group
    return Firings(groups, positions, priorities(feature_hash[features], positions))


def row_peaks(features: Tensor, positions: Tensor, values: Tensor, row_length: int) -> Firings:
    """The highest pair of each (feature, row), the lowest position among equals; by feature and then by row.

    The row of a position is ``position // row_length``.
    """
    keys, order = torch.sort(row_keys(features, positions, row_length))
    features, positions, values = features[order], positions[order], values[order]
    _, inverse, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    peaks = values.new_zeros(len(counts)).scatter_reduce_(0, inverse, values, "amax")
    high = torch.iinfo(torch.int64).max
    at_peak = torch.where(values == peaks[inverse], positions, high)
    first = torch.full_like(counts, high).scatter_reduce_(0, inverse, at_peak, "amin")
    return Firings(features[counts.cumsum(0) - counts], first, peaks)


def row_keys(features: Tensor, positions: Tensor, row_length: int) -> Tensor:
    """An integer of each (feature, row); int64 holds 2^23 features and 2^40 rows."""
    return (features << 40) + positions.div(row_length, rounding_mode="floor")
