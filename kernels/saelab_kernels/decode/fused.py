"""Sparse decoding on a GPU: one program for each token and tile of columns.

    out[n, c] = sum_p acts[p] W_dec[features[p], c],  p = first(n) .. last(n) - 1, added in this order in float32

Token n owns the entries n k .. (n + 1) k - 1, or offsets[n] .. offsets[n + 1] - 1 where rows differ in length.

Tokens vary faster than tiles, so the programs that run at one time share one tile of columns: at F = 65,536 in bfloat16
that is 34 MB of W_dec, which stays in the L2 cache of an H100 (50 MB) while all of W_dec (302 MB at d = 2304) does not.
Tiles also spare narrow and odd widths the padding to a power of two (2304 -> 4096).
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import Variant

WIDTH = 256  # columns of a tile: 16 bytes of bfloat16 for each thread of one warp
ROWS = 8  # rows of W_dec in flight at once: 4 KB a warp, so 8 warps hide the latency of memory


@triton.jit
def add_rows(
    total, coefficients_ptr, rows_ptr, matrix_ptr, first, last, columns, d, ROWS: tl.constexpr
):  # fmt: skip
    """``total`` [columns] + sum over p in first .. last - 1 of coefficients[p] * matrix[rows[p], columns], in order."""
    for start in range(first, last, ROWS):
        for step in tl.static_range(ROWS):
            at = start + step
            live = at < last
            row = tl.load(rows_ptr + at, mask=live, other=0).to(tl.int64)
            coefficient = tl.load(coefficients_ptr + at, mask=live, other=0.0).to(tl.float32)
            values = tl.load(matrix_ptr + row * d + columns, mask=live & (columns < d), other=0.0)
            total += coefficient * values.to(tl.float32)
    return total


@triton.jit
def _decode(
    acts_ptr, features_ptr, offsets_ptr, weights_ptr, out_ptr, k, d,
    RAGGED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    if RAGGED:
        first, last = tl.load(offsets_ptr + token), tl.load(offsets_ptr + token + 1)
    else:
        first, last = token * k, token * k + k
    total = tl.zeros((WIDTH,), tl.float32)
    total = add_rows(total, acts_ptr, features_ptr, weights_ptr, first, last, columns, d, ROWS)
    tl.store(out_ptr + token * d + columns, total, mask=columns < d)


def sparse_decode(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor) -> Tensor:
    """top_acts [N, k], top_indices int64 [N, k], W_dec [F, d] -> float32 [N, d], summed in the order of the slots."""
    n_tokens, k = top_indices.shape
    return _launch(top_acts, top_indices, top_indices, W_dec, n_tokens, k, ragged=False)


def ragged_decode(offsets: Tensor, features: Tensor, acts: Tensor, W_dec: Tensor) -> Tensor:
    """offsets int64 [N + 1], features int64 [P], acts [P], W_dec [F, d] -> float32 [N, d], in order."""
    return _launch(acts, features, offsets, W_dec, len(offsets) - 1, 0, ragged=True)


def _launch(
    acts: Tensor, features: Tensor, offsets: Tensor, W_dec: Tensor, n_tokens: int, k: int, *, ragged: bool
) -> Tensor:
    d = W_dec.shape[1]
    out = torch.empty(n_tokens, d, device=W_dec.device)
    if out.numel():
        acts, features, W_dec = acts.float().contiguous(), features.contiguous(), W_dec.contiguous()
        _decode[n_tokens, triton.cdiv(d, WIDTH)](
            acts, features, offsets, W_dec, out, k, d, RAGGED=ragged, ROWS=ROWS, WIDTH=WIDTH, num_warps=1
        )
    return out


def variants() -> list[Variant]:
    """Every way in which the kernel may be launched."""
    return [
        Variant(
            _decode,
            {
                "acts_ptr": "*fp32",
                "features_ptr": "*i64",
                "offsets_ptr": "*i64",
                "weights_ptr": f"*{dtype}",
                "out_ptr": "*fp32",
                "k": "i32",
                "d": "i32",
            },
            {"RAGGED": ragged, "ROWS": ROWS, "WIDTH": WIDTH},
            divisible=divisible,
            options={"num_warps": 1},
        )
        for dtype, ragged, divisible in product(("bf16", "fp32"), (False, True), ((), ("d",)))
    ]
