"""Sampled dot products on a GPU: one program for each token, a few of its entries at a time.

    out[p] = sum_c vectors[n, c] weights[indices[p], c],  p = first(n) .. last(n) - 1

The order of summation is written out: lane c of WIDTH adds columns c, c + WIDTH, ... in turn, then the lanes are folded
in halves. So an entry's bits depend on the two rows alone, not on the batch, the slot, or where a tensor begins.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import Variant

WIDTH = 256  # columns at a time; part of the order of summation, hence the same for every width and dtype
SLOTS = 8  # entries at a time: 16 partial sums for each of 128 threads, 4 KB of bfloat16 rows in flight


@triton.jit
def fold(parts, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Sums [ROWS] of ``parts`` [ROWS, WIDTH], halving: a sum of two has one order, whatever thread holds which part."""
    if WIDTH == 1:
        return tl.reshape(parts, (ROWS,))
    else:  # noqa: RET505 (a branch of a constant: the other one is not compiled)
        halves = tl.reshape(parts, (ROWS, 2, WIDTH // 2))
        return fold(tl.sum(halves, axis=1), ROWS, WIDTH // 2)


@triton.jit
def _dots(
    vectors_ptr, weights_ptr, offsets_ptr, indices_ptr, out_ptr, k, d,
    RAGGED: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    if RAGGED:
        first, last = tl.load(offsets_ptr + token), tl.load(offsets_ptr + token + 1)
    else:
        first, last = token * k, token * k + k
    for start in range(first, last, SLOTS):
        entries = start + tl.arange(0, SLOTS)
        live = entries < last
        rows = tl.load(indices_ptr + entries, mask=live, other=0).to(tl.int64)
        parts = tl.zeros((SLOTS, WIDTH), tl.float32)
        for left in range(0, d, WIDTH):
            columns = left + tl.arange(0, WIDTH)
            inside = columns < d
            vector = tl.load(vectors_ptr + token * d + columns, mask=inside, other=0.0).to(tl.float32)
            weights = tl.load(
                weights_ptr + rows[:, None] * d + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0
            )
            parts += weights.to(tl.float32) * vector[None, :]
        tl.store(out_ptr + entries, fold(parts, SLOTS, WIDTH), mask=live)


def sampled_dot(vectors: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """vectors [N, d], weights [F, d], indices int64 [N, k] -> float32 [N, k]."""
    n_tokens, k = indices.shape
    return _launch(vectors, weights, indices, indices, n_tokens, k, ragged=False)


def ragged_dot(vectors: Tensor, weights: Tensor, offsets: Tensor, features: Tensor) -> Tensor:
    """Float32 [P] for pairs in token-major order: token n owns ``features[offsets[n]:offsets[n + 1]]``."""
    return _launch(vectors, weights, offsets, features, len(offsets) - 1, 0, ragged=True)


def _launch(
    vectors: Tensor, weights: Tensor, offsets: Tensor, indices: Tensor, n_tokens: int, k: int, *, ragged: bool
) -> Tensor:
    out = torch.empty(indices.shape, device=weights.device)
    if out.numel():
        vectors, weights, indices = vectors.contiguous(), weights.contiguous(), indices.contiguous()
        _dots[n_tokens,](
            vectors, weights, offsets, indices, out, k, weights.shape[1],
            RAGGED=ragged, SLOTS=SLOTS, WIDTH=WIDTH, num_warps=4,
        )  # fmt: skip
    return out


def variants() -> list[Variant]:
    """Every way in which the kernel may be launched."""
    return [
        Variant(
            _dots,
            {
                "vectors_ptr": f"*{vectors}",
                "weights_ptr": f"*{weights}",
                "offsets_ptr": "*i64",
                "indices_ptr": "*i64",
                "out_ptr": "*fp32",
                "k": "i32",
                "d": "i32",
            },
            {"RAGGED": ragged, "SLOTS": SLOTS, "WIDTH": WIDTH},
            divisible=divisible,
        )
        for (vectors, weights), ragged, divisible in product(
            (("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")), (False, True), ((), ("d",))
        )
    ]
