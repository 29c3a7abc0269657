"""A search on a GPU. Integer atomics count, which no order changes; everything else has one writer a place.

``scan_top``    a program for each BLOCK of pairs counts those that pass; after a prefix sum of the counts the same
                programs write them, each behind those before it, so that the order of the pairs stays.
``hist_sample`` a program for each BLOCK of pairs; the sample's gate is ``scan_top`` once more.
``merge_top_``  the new pairs are sorted, then a program for each group with new ones holds its m old and the m best new
                in registers. Both are in order, so the rank of each is its place plus the number of the other side's
                pairs before it, counted over all combinations; it is written to its rank. The old ones are read from
                a copy. Places are padded to PLACES, a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import Variant
from saelab_kernels.search import reference
from saelab_kernels.search.hashing import PRIORITY_BITS
from saelab_kernels.search.types import EXPONENTS_PER_SUM, MANTISSA, N_SUMS, Bins, Firings, Tally, TopState, nothing

BLOCK = 1024  # pairs of one program: 8 a thread
#: By type of the values; more would not fit into registers, and such a state is merged by torch's sorts.
MAX_PLACES = {torch.float32: 128, torch.int64: 64}
_WARPS = {16: 1, 32: 1, 64: 4, 128: 8}  # by PLACES: PLACES x PLACES combinations are compared in registers


@triton.jit
def _count_passing(features_ptr, values_ptr, threshold_ptr, counts_ptr, n_pairs, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_pairs
    feature = tl.load(features_ptr + at, mask=inside, other=0)
    passes = tl.load(values_ptr + at, mask=inside, other=0) >= tl.load(threshold_ptr + feature, mask=inside, other=0)
    tl.store(counts_ptr + block, tl.sum((passes & inside).to(tl.int64), axis=0))


@triton.jit
def _write_passing(
    features_ptr, positions_ptr, values_ptr, threshold_ptr, ends_ptr, counts_ptr, out_features_ptr, out_positions_ptr,
    out_values_ptr, n_pairs, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_pairs
    feature = tl.load(features_ptr + at, mask=inside, other=0)
    value = tl.load(values_ptr + at, mask=inside, other=0)
    passes = (value >= tl.load(threshold_ptr + feature, mask=inside, other=0)) & inside
    one = passes.to(tl.int64)
    to = tl.load(ends_ptr + block) - tl.load(counts_ptr + block) + tl.cumsum(one, axis=0) - one
    tl.store(out_features_ptr + to, feature, mask=passes)
    tl.store(out_positions_ptr + to, tl.load(positions_ptr + at, mask=inside, other=0), mask=passes)
    tl.store(out_values_ptr + to, value, mask=passes)


@triton.jit
def _merge_top(
    old_values_ptr, old_positions_ptr, new_values_ptr, new_positions_ptr, starts_ptr, groups_ptr, values_ptr,
    positions_ptr, threshold_ptr, m, EMPTY: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts_ptr + run), tl.load(starts_ptr + run + 1)
    group = tl.load(groups_ptr + run)
    place = tl.arange(0, PLACES)
    value = tl.load(old_values_ptr + run * m + place, mask=place < m, other=EMPTY)
    position = tl.load(old_positions_ptr + run * m + place, mask=place < m, other=-1)
    live = first + place < last
    new_value = tl.load(new_values_ptr + first + place, mask=live, other=EMPTY)
    new_position = tl.load(new_positions_ptr + first + place, mask=live, other=-1)
    # [old, new]: is the new one first? Its value is higher, or equal and its position lower; empty places come last
    higher = new_value[None, :] > value[:, None]
    equal = (new_value[None, :] == value[:, None]) & (new_position[None, :] < position[:, None])
    new_first = ((higher | equal) & live[None, :]).to(tl.int32)
    rank = place + tl.sum(new_first, axis=1)
    new_rank = place + PLACES - tl.sum(new_first, axis=0)
    # places beyond m are empty, and no new pair stands behind an empty place: they count as before nobody
    at = group * m + rank
    stays = (rank < m) & (place < m)
    tl.store(values_ptr + at, value, mask=stays)
    tl.store(positions_ptr + at, position, mask=stays)
    tl.store(threshold_ptr + group + place * 0, value, mask=stays & (rank == m - 1))
    at = group * m + new_rank
    enters = (new_rank < m) & live
    tl.store(values_ptr + at, new_value, mask=enters)
    tl.store(positions_ptr + at, new_position, mask=enters)
    tl.store(threshold_ptr + group + place * 0, new_value, mask=enters & (new_rank == m - 1))


@triton.jit
def _moved_down(z, BITS: tl.constexpr):
    """The bits of an int64 moved down, zeros moving in."""
    return (z >> BITS) & ((1 << (64 - BITS)) - 1)


@triton.jit
def _hist_sample(
    features_ptr, positions_ptr, values_ptr, counts_ptr, sums_ptr, hashes_ptr, groups_ptr, priorities_ptr, n_pairs,
    first_bin, n_bins, SHIFT: tl.constexpr, GROUP: tl.constexpr, SAMPLE: tl.constexpr, MANTISSA: tl.constexpr,
    PER_SUM: tl.constexpr, N_SUMS: tl.constexpr, PRIORITY_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_pairs
    feature = tl.load(features_ptr + at, mask=inside, other=0)
    bits = tl.load(values_ptr + at, mask=inside, other=1.0).to(tl.int32, bitcast=True)
    index = tl.minimum(tl.maximum((bits >> SHIFT) - first_bin, 0), n_bins - 1)
    tl.atomic_add(counts_ptr + feature * n_bins + index, tl.full((BLOCK,), 1, tl.int32), mask=inside)
    exponent = bits >> MANTISSA
    mantissa = ((bits & ((1 << MANTISSA) - 1)) | (1 << MANTISSA)).to(tl.int64) << (exponent % PER_SUM).to(tl.int64)
    tl.atomic_add(sums_ptr + feature * N_SUMS + exponent // PER_SUM, mantissa, mask=inside)
    if SAMPLE:
        tl.store(groups_ptr + at, feature * (n_bins // GROUP) + index // GROUP, mask=inside)
        z = tl.load(hashes_ptr + feature, mask=inside, other=0) ^ tl.load(positions_ptr + at, mask=inside, other=0)
        # SplitMix64's factors as int64, whose products wrap around as those of uint64 do
        z = (z ^ _moved_down(z, 30)) * -4658895280553007687
        z = (z ^ _moved_down(z, 27)) * -7723592293110705685
        z = _moved_down(z ^ _moved_down(z, 31), 64 - PRIORITY_BITS)
        tl.store(priorities_ptr + at, -z, mask=inside)


def scan_top(features: Tensor, positions: Tensor, values: Tensor, threshold: Tensor) -> Firings:
    """As the reference; the number of pairs that pass is read back once."""
    if not len(features):
        return Firings(features, positions, values)
    features, positions, values = features.contiguous(), positions.contiguous(), values.contiguous()
    grid = (triton.cdiv(len(features), BLOCK),)
    counts = torch.empty(grid, dtype=torch.int64, device=features.device)
    _count_passing[grid](features, values, threshold, counts, len(features), BLOCK=BLOCK, num_warps=4)
    ends = counts.cumsum(0)
    n_passing = int(ends[-1])
    found = Firings(features.new_empty(n_passing), positions.new_empty(n_passing), values.new_empty(n_passing))
    _write_passing[grid](
        features, positions, values, threshold, ends, counts, *found, len(features), BLOCK=BLOCK, num_warps=4
    )
    return found


def merge_top_(state: TopState, features: Tensor, positions: Tensor, values: Tensor) -> TopState:
    """As the reference. Reads back how many groups have new pairs, once."""
    m = state.values.shape[1]
    if m > MAX_PLACES[state.values.dtype]:
        return reference.merge_top_(state, features, positions, values)
    if not len(features):
        return state
    best = reference.sorted_best_first(features, positions, values)
    groups, n_new = torch.unique_consecutive(best.features, return_counts=True)
    starts = torch.cat([n_new.new_zeros(1), n_new.cumsum(0)])
    places = max(16, triton.next_power_of_2(m))
    _merge_top[len(groups),](
        state.values[groups], state.positions[groups], best.values, best.positions, starts, groups, *state, m,
        EMPTY=nothing(state.values.dtype), PLACES=places, num_warps=_WARPS[places],
    )  # fmt: skip
    return state


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
    sample = feature_hash is not None
    groups, priorities = torch.empty(2, len(features) if sample else 0, dtype=torch.int64, device=features.device)
    if len(features):
        _hist_sample[triton.cdiv(len(features), BLOCK),](
            features.contiguous(), positions.contiguous(), values.contiguous(), *tally,
            tally.sums if feature_hash is None else feature_hash, groups, priorities, len(features),
            bins.first, bins.n_bins, **_constants(bins, group, sample), num_warps=4,
        )  # fmt: skip
    return Firings(groups, positions, priorities) if sample else None


def _constants(bins: Bins, group: int, sample: bool) -> dict[str, int | bool]:
    return {
        "SHIFT": bins.shift,
        "GROUP": group,
        "SAMPLE": sample,
        "MANTISSA": MANTISSA,
        "PER_SUM": EXPONENTS_PER_SUM,
        "N_SUMS": N_SUMS,
        "PRIORITY_BITS": PRIORITY_BITS,
        "BLOCK": BLOCK,
    }


def variants() -> list[Variant]:
    """Every way in which the kernels may be launched."""
    pairs = {"features_ptr": "*i64", "positions_ptr": "*i64"}
    found = [
        Variant(
            _hist_sample,
            pairs
            | {"values_ptr": "*fp32", "counts_ptr": "*i32", "sums_ptr": "*i64", "hashes_ptr": "*i64"}
            | {"groups_ptr": "*i64", "priorities_ptr": "*i64", "n_pairs": "i32", "first_bin": "i32", "n_bins": "i32"},
            _constants(Bins(), 16, sample),
        )
        for sample in (False, True)
    ]
    for kind, dtype in (("fp32", torch.float32), ("i64", torch.int64)):
        values = {"values_ptr": f"*{kind}", "threshold_ptr": f"*{kind}"}
        counts = {"counts_ptr": "*i64", "n_pairs": "i32"}
        out = {"out_features_ptr": "*i64", "out_positions_ptr": "*i64", "out_values_ptr": f"*{kind}"}
        merged = {"positions_ptr": "*i64", "starts_ptr": "*i64", "groups_ptr": "*i64", "m": "i32"}
        merged |= {f"{age}_values_ptr": f"*{kind}" for age in ("old", "new")}
        merged |= {f"{age}_positions_ptr": "*i64" for age in ("old", "new")}
        found += [
            Variant(_count_passing, {"features_ptr": "*i64"} | values | counts, {"BLOCK": BLOCK}),
            Variant(_write_passing, pairs | values | counts | out | {"ends_ptr": "*i64"}, {"BLOCK": BLOCK}),
        ]
        found += [
            Variant(
                _merge_top,
                values | merged,
                {"EMPTY": nothing(dtype), "PLACES": places},
                options={"num_warps": n_warps},
            )
            for places, n_warps in _WARPS.items()
            if places <= MAX_PLACES[dtype]
        ]
    return found
