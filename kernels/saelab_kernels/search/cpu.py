"""numpy on what a chunk brings: gates before sorts, and only groups with something new are touched.

``merge_top_`` sorts the new pairs alone (one integer of group and leading value bits; ties are settled afterwards),
finds by bisection how many of its group's m old pairs precede each, and moves old and new to their ranks:

    rank of a new pair = its rank among the new ones + old pairs before it
    rank of an old pair = its rank + new pairs before it

Work is cut into blocks that stay in the cache with all their intermediate results.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from saelab_kernels.search.hashing import PRIORITY_BITS, mixed
from saelab_kernels.search.reference import row_keys
from saelab_kernels.search.types import EXPONENTS_PER_SUM, MANTISSA, N_SUMS, Bins, Firings, Tally, TopState

#: Pairs of one block: ten arrays of it fit into a core's L2 cache.
_BLOCK = 1 << 14


def scan_top(features: Tensor, positions: Tensor, values: Tensor, threshold: Tensor) -> Firings:
    """As the reference."""
    arrays = features.numpy(), positions.numpy(), values.numpy()
    kept = np.flatnonzero(arrays[2] >= threshold.numpy()[arrays[0]])
    return Firings(*(torch.from_numpy(array[kept]) for array in arrays))


def merge_top_(state: TopState, features: Tensor, positions: Tensor, values: Tensor) -> TopState:
    """As the reference."""
    arrays = features.numpy(), positions.numpy(), values.numpy()
    order = _sorted_order(*arrays)
    groups = arrays[0][order]
    starts = np.append(np.flatnonzero(_first_of_run(groups)), len(groups))
    cuts = np.unique(np.searchsorted(starts, np.arange(0, len(groups) + _BLOCK, _BLOCK)))
    for first, last in pairwise(np.minimum(cuts, len(starts) - 1).tolist()):  # blocks of whole groups
        inside = starts[first : last + 1]
        chosen = order[inside[0] : inside[-1]]
        _merge_block(state, groups[inside[:-1]], np.diff(inside), arrays[1][chosen], arrays[2][chosen])
    return state


def _merge_block(
    state: TopState, touched: np.ndarray, n_new: np.ndarray, positions: np.ndarray, values: np.ndarray
) -> None:
    """Merge the new pairs of the groups ``touched``, each group's in the order that the state has: ``n_new`` each."""
    old_values, old_positions, threshold = (tensor.numpy() for tensor in state)
    m, rows = old_values.shape[1], np.arange(len(touched))
    run = np.repeat(rows, n_new)
    rank = np.arange(len(run)) - (np.cumsum(n_new) - n_new)[run]
    before = _n_before(old_values, old_positions, touched[run], positions, values)
    insertions = np.bincount(run * (m + 1) + before, minlength=len(touched) * (m + 1)).reshape(-1, m + 1)
    moved = np.cumsum(insertions[:, :m], axis=1) + np.arange(m)
    stay = moved < m
    moved += rows[:, None] * m
    rank += before
    enter = rank < m
    at = (run * m + rank)[enter]
    for old, new in ((old_values, values), (old_positions, positions)):
        merged = np.empty(len(touched) * m, old.dtype)
        merged[moved[stay]] = old[touched][stay]
        merged[at] = new[enter]
        old[touched] = merged.reshape(-1, m)
    threshold[touched] = old_values[touched, m - 1]


def hist_sample(
    features: Tensor,
    positions: Tensor,
    values: Tensor,
    tally: Tally,
    bins: Bins,
    feature_hash: Tensor | None,
    group: int,
) -> Firings | None:
    """As the reference."""
    counts, sums = tally.counts.view(-1), tally.sums.view(-1)
    ones = torch.ones(_BLOCK, dtype=torch.int32)
    groups, priorities = torch.empty_like(features), torch.empty_like(positions)
    hashes = None if feature_hash is None else feature_hash.numpy().view(np.uint64)
    for start in range(0, len(features), _BLOCK):
        block = slice(start, start + _BLOCK)
        feature, bits = features[block].numpy(), values[block].numpy().view(np.int32)
        index = (bits >> bins.shift) - np.int32(bins.first)
        np.clip(index, 0, bins.n_bins - 1, out=index)
        counts.index_add_(0, torch.from_numpy(feature * bins.n_bins + index), ones[: len(feature)])
        exponent = bits >> MANTISSA
        mantissa = ((bits & ((1 << MANTISSA) - 1)) | (1 << MANTISSA)).astype(np.int64)
        mantissa <<= exponent & (EXPONENTS_PER_SUM - 1)
        exponent >>= EXPONENTS_PER_SUM.bit_length() - 1
        sums.index_add_(0, torch.from_numpy(feature * N_SUMS + exponent), torch.from_numpy(mantissa))
        if hashes is not None:
            index >>= group.bit_length() - 1
            np.add(feature * (bins.n_bins // group), index, out=groups[block].numpy())
            drawn = mixed(hashes[feature] ^ positions[block].numpy().view(np.uint64))
            drawn >>= np.uint64(64 - PRIORITY_BITS)
            np.negative(drawn.view(np.int64), out=priorities[block].numpy())
    return None if hashes is None else Firings(groups, positions, priorities)


def row_peaks(features: Tensor, positions: Tensor, values: Tensor, row_length: int) -> Firings:
    """As the reference."""
    if not len(features):
        return Firings(features, positions, values)
    feature, position, value = features.numpy(), positions.numpy(), values.numpy()
    sorted_keys, order = torch.sort(row_keys(features, positions, row_length))  # faster than numpy's
    feature, position, value = (array[order.numpy()] for array in (feature, position, value))
    first = _first_of_run(sorted_keys.numpy())
    starts = np.flatnonzero(first)
    peaks = np.maximum.reduceat(value, starts)
    position = np.where(value == peaks[np.cumsum(first) - 1], position, np.iinfo(np.int64).max)
    found = feature[starts], np.minimum.reduceat(position, starts), peaks
    return Firings(*(torch.from_numpy(array) for array in found))


def _sorted_order(groups: np.ndarray, positions: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Indices that sort by group, then by descending value, then by position."""
    # 31 bits that fall as the value rises; of an int64 only the leading ones, and the rest is settled as ties are
    falling = 0x7FFFFFFF - values.view(np.int32).astype(np.int64) if values.dtype == np.float32 else -values >> 31
    sorted_keys, indices = torch.sort(torch.from_numpy(groups << 31 | falling))
    order, keys = indices.numpy(), sorted_keys.numpy()
    same = keys[1:] == keys[:-1]
    if same.any():
        tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
        which = order[tied]
        order[tied] = which[np.lexsort((positions[which], -values[which], groups[which]))]
    return order


def _n_before(
    old_values: np.ndarray, old_positions: np.ndarray, groups: np.ndarray, positions: np.ndarray, values: np.ndarray
) -> np.ndarray:
    """How many of its group's old pairs, which are sorted, precede each new pair: a bisection of all pairs at once."""
    m = old_values.shape[1]
    flat_values, flat_positions = old_values.reshape(-1), old_positions.reshape(-1)
    base = groups * m
    at, n_left = base.copy(), m
    while n_left > 1:
        half = n_left // 2
        at += half * (flat_values[at + (half - 1)] > values)
        n_left -= half
    at += flat_values[at] > values
    last = base + (m - 1)
    while True:  # as often as the most equal old values before a new one, mostly not at all
        here = np.minimum(at, last)
        equal = (flat_values[here] == values) & (flat_positions[here] < positions) & (at <= last)
        if not equal.any():
            return at - base
        at += equal


def _first_of_run(column: np.ndarray) -> np.ndarray:
    first = np.ones(len(column), bool)
    np.not_equal(column[1:], column[:-1], out=first[1:])
    return first
