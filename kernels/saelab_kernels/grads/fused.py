"""Sums over the pairs of each feature on a GPU: one program for each feature and tile of columns, no atomics.

    out[f, c] = sum_p values[p] vectors[tokens[p], c],  p = starts[f] .. starts[f + 1] - 1

A feature of at most SEGMENT pairs is added up in the order of its pairs. One of more, which a single program would hold
up, is cut where the positions of the pairs are multiples of SEGMENT; programs of their own write each piece to scratch
memory and the feature's program adds the pieces in order. Such a feature cannot lie within a segment, so a segment
holds pieces of at most two of them: of the one that owns its first position and of the one that owns its last. Hence
ceil(P / SEGMENT) programs and twice as many scratch rows suffice whatever the data, and nothing is read back to plan.

Features vary faster than tiles, so that the tile of ``vectors`` in use (4 MB for 8192 tokens) stays in the L2 cache.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import Variant
from saelab_kernels.decode.fused import add_rows
from saelab_kernels.pairs import Pairs

SEGMENT = 1024  # pairs that one program adds up at most: about 0.1 ms of waiting for memory
WIDTH = 256  # columns of a tile: 16 bytes of bfloat16 for each thread of one warp
ROWS = 8  # rows in flight at once, over both matrices of a joint sum
CHUNK = 256  # pairs that ``sums`` reads at once


class WeightGrads(NamedTuple):
    """Gradients of both weight matrices and of the encoder's bias, float32."""

    W_dec: Tensor  # [F, d]
    W_enc: Tensor  # [F, d]
    b_enc: Tensor  # [F]


class Rows(NamedTuple):
    """Rows of one sum over pairs or of two."""

    first: Tensor
    second: Tensor  # the same tensor where there is one sum only


@triton.jit
def add_two_rows(
    total, other_total, tokens_ptr, values_ptr, vectors_ptr, other_values_ptr, other_vectors_ptr, first, last, columns,
    d, ROWS: tl.constexpr,
):  # fmt: skip
    """Two sums over the same pairs in one loop, each as ``add_rows`` makes it, with ROWS rows of each in flight."""
    for start in range(first, last, ROWS):
        for step in tl.static_range(ROWS):
            at = start + step
            live = at < last
            inside = live & (columns < d)
            row = tl.load(tokens_ptr + at, mask=live, other=0).to(tl.int64) * d
            value = tl.load(values_ptr + at, mask=live, other=0.0).to(tl.float32)
            other_value = tl.load(other_values_ptr + at, mask=live, other=0.0).to(tl.float32)
            vector = tl.load(vectors_ptr + row + columns, mask=inside, other=0.0)
            other_vector = tl.load(other_vectors_ptr + row + columns, mask=inside, other=0.0)
            total += value * vector.to(tl.float32)
            other_total += other_value * other_vector.to(tl.float32)
    return total, other_total


@triton.jit
def add_segments(total, partials_ptr, low, high, columns, d, SEGMENT: tl.constexpr):
    """``total`` + the scratch rows of the feature whose pairs are low .. high - 1, in order."""
    for segment in range(low // SEGMENT, (high - 1) // SEGMENT + 1):
        row = 2 * segment + (low > segment * SEGMENT).to(tl.int64)
        total += tl.load(partials_ptr + row.to(tl.int64) * d + columns, mask=columns < d, other=0.0)
    return total


@triton.jit
def _segment_sums(
    starts_ptr, owners_ptr, tokens_ptr, values_ptr, vectors_ptr, other_values_ptr, other_vectors_ptr, partials_ptr,
    other_partials_ptr, d, TWO: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    begin = segment * SEGMENT
    for side in tl.static_range(2):
        feature = tl.load(owners_ptr + 2 * segment + side)
        low, high = tl.load(starts_ptr + feature), tl.load(starts_ptr + feature + 1)
        wanted = high - low > SEGMENT
        if side == 1:  # else it owns the first pair too
            wanted = wanted & (low > begin)
        if wanted:
            first, last = tl.maximum(low, begin), tl.minimum(high, begin + SEGMENT)
            at = (2 * segment + side) * d + columns
            total = tl.zeros((WIDTH,), tl.float32)
            if TWO:
                total, other_total = add_two_rows(
                    total, tl.zeros((WIDTH,), tl.float32), tokens_ptr, values_ptr, vectors_ptr, other_values_ptr,
                    other_vectors_ptr, first, last, columns, d, ROWS // 2,
                )  # fmt: skip
                tl.store(other_partials_ptr + at, other_total, mask=columns < d)
            else:
                total = add_rows(total, values_ptr, tokens_ptr, vectors_ptr, first, last, columns, d, ROWS)
            tl.store(partials_ptr + at, total, mask=columns < d)


@triton.jit
def _feature_sums(
    starts_ptr, tokens_ptr, values_ptr, vectors_ptr, other_values_ptr, other_vectors_ptr, partials_ptr,
    other_partials_ptr, out_ptr, other_out_ptr, d,
    TWO: tl.constexpr, SEGMENT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    low, high = tl.load(starts_ptr + feature), tl.load(starts_ptr + feature + 1)
    total = tl.zeros((WIDTH,), tl.float32)
    other_total = tl.zeros((WIDTH,), tl.float32)
    if high - low > SEGMENT:
        total = add_segments(total, partials_ptr, low, high, columns, d, SEGMENT)
        if TWO:
            other_total = add_segments(other_total, other_partials_ptr, low, high, columns, d, SEGMENT)
    else:
        if TWO:
            total, other_total = add_two_rows(
                total, other_total, tokens_ptr, values_ptr, vectors_ptr, other_values_ptr, other_vectors_ptr, low, high,
                columns, d, ROWS // 2,
            )  # fmt: skip
        else:
            total = add_rows(total, values_ptr, tokens_ptr, vectors_ptr, low, high, columns, d, ROWS)
    tl.store(out_ptr + feature * d + columns, total, mask=columns < d)
    if TWO:
        tl.store(other_out_ptr + feature * d + columns, other_total, mask=columns < d)


@triton.jit
def _value_sums(starts_ptr, values_ptr, out_ptr, CHUNK: tl.constexpr):
    feature = tl.program_id(0).to(tl.int64)
    low, high = tl.load(starts_ptr + feature), tl.load(starts_ptr + feature + 1)
    parts = tl.zeros((CHUNK,), tl.float32)
    for start in range(low, high, CHUNK):
        at = start + tl.arange(0, CHUNK)
        parts += tl.load(values_ptr + at, mask=at < high, other=0.0).to(tl.float32)
    tl.store(out_ptr + feature, tl.sum(parts, axis=0))


def weighted_sums(pairs: Pairs, values: Tensor, vectors: Tensor) -> Tensor:
    """Float32 [F, d] from the coefficient of each pair, in the order of the pairs, and vectors [N, d]."""
    return _launch(pairs, values, vectors, None, None).first


def two_weighted_sums(pairs: Pairs, a: Tensor, g: Tensor, p: Tensor, x: Tensor) -> WeightGrads:
    """``weighted_sums`` of (a, g) for W_dec and of (p, x) for W_enc in one loop, and ``sums`` of p for b_enc.

    a and p [P] in the order of the pairs, g and x [N, d].
    """
    both = _launch(pairs, a, g, p, x)
    return WeightGrads(both.first, both.second, sums(pairs, p))


def sums(pairs: Pairs, values: Tensor) -> Tensor:
    """Float32 [F] from the coefficient of each pair, in the order of the pairs."""
    n_features = len(pairs.starts) - 1
    out = torch.empty(n_features, device=values.device)
    if n_features:
        _value_sums[n_features,](pairs.starts, values.contiguous(), out, CHUNK=CHUNK, num_warps=1)
    return out


def segment_sums(pairs: Pairs, a: Tensor, g: Tensor, p: Tensor | None = None, x: Tensor | None = None) -> Rows:
    """Scratch rows [2 ceil(P / SEGMENT), d] of one sum (a, g) or of two; all tensors contiguous.

    Row 2 s is for the feature that owns the first pair of segment s, row 2 s + 1 for one that begins within it. Only
    those of features with more than SEGMENT pairs are written.
    """
    n_pairs, d = len(pairs.tokens), g.shape[1]
    if n_pairs <= SEGMENT:  # then there are no such features, and no row is read
        nothing = torch.empty(0, device=g.device)
        return Rows(nothing, nothing)
    begins = torch.arange(0, n_pairs, SEGMENT, device=g.device)
    ends = (begins + (SEGMENT - 1)).clamp_(max=n_pairs - 1)
    owners = torch.searchsorted(pairs.starts, torch.stack([begins, ends], dim=1), right=True) - 1
    first = torch.empty(2 * len(begins), d, device=g.device)
    second = first if p is None else torch.empty_like(first)
    _segment_sums[len(begins), triton.cdiv(d, WIDTH)](
        pairs.starts, owners, pairs.tokens, a, g, a if p is None else p, g if x is None else x, first, second, d,
        TWO=p is not None, SEGMENT=SEGMENT, ROWS=ROWS, WIDTH=WIDTH, num_warps=1,
    )  # fmt: skip
    return Rows(first, second)


def _launch(pairs: Pairs, a: Tensor, g: Tensor, p: Tensor | None, x: Tensor | None) -> Rows:
    n_features, d = len(pairs.starts) - 1, g.shape[1]
    a, g = a.contiguous(), g.contiguous()
    p, x = None if p is None else p.contiguous(), None if x is None else x.contiguous()
    out = torch.empty(n_features, d, device=g.device)
    other = out if p is None else torch.empty_like(out)
    if out.numel():
        partials = segment_sums(pairs, a, g, p, x)
        _feature_sums[n_features, triton.cdiv(d, WIDTH)](
            pairs.starts, pairs.tokens, a, g, a if p is None else p, g if x is None else x, *partials, out, other, d,
            TWO=p is not None, SEGMENT=SEGMENT, ROWS=ROWS, WIDTH=WIDTH, num_warps=1,
        )  # fmt: skip
    return Rows(out, other)


def variants() -> list[Variant]:
    """Every way in which the kernels may be launched."""
    constants = {"SEGMENT": SEGMENT, "ROWS": ROWS, "WIDTH": WIDTH}
    found = [
        Variant(_value_sums, {"starts_ptr": "*i64", "values_ptr": "*fp32", "out_ptr": "*fp32"}, {"CHUNK": CHUNK},
                options={"num_warps": 1})
    ]  # fmt: skip
    dtypes = [("bf16", "bf16", False), ("fp32", "fp32", False)]
    dtypes += [("bf16", "bf16", True), ("fp32", "bf16", True), ("fp32", "fp32", True)]
    for (vectors, other, two), divisible in product(dtypes, ((), ("d",))):
        sources = {
            "starts_ptr": "*i64",
            "owners_ptr": "*i64",
            "tokens_ptr": "*i64",
            "values_ptr": "*fp32",
            "vectors_ptr": f"*{vectors}",
            "other_values_ptr": "*fp32",
            "other_vectors_ptr": f"*{other}",
            "partials_ptr": "*fp32",
            "other_partials_ptr": "*fp32",
            "out_ptr": "*fp32",
            "other_out_ptr": "*fp32",
            "d": "i32",
        }
        found += [
            Variant(
                kernel,
                {name: sources[name] for name in kernel.arg_names if name in sources},
                constants | {"TWO": two},
                divisible=divisible,
                options={"num_warps": 1},
            )
            for kernel in (_segment_sums, _feature_sums)
        ]
    return found
