"""Route B's kernel: a matrix product whose tiles never reach memory; what beats a threshold is appended to its row.

    pre[n, f] = sum_c x[n, c] W[f, c] + b[f];   emitted where  not (pre <= row_thr[n])  and  not (pre <= col_thr[f])

so NaN is always emitted, and NaN as a threshold is none. A tile of 128 x 256 sums lives in registers; asking for slots
for all of it at once would spill kilobytes a thread, so it is halved down to 16 columns before anything is emitted.
Slots come from atomics and their order differs between runs: what is defined is the set, and the count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels import compiled
from saelab_kernels.compiled import Variant
from saelab_kernels.select.fused import order_of, pack


class Tile(NamedTuple):
    """Rows and columns of the product in one program, the width of a step, and how it is launched."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


#: 3 stages of (128 + 256) x 64 values of 16 bits are 144 KB of shared memory, within both sm_80's 164 and sm_90's 228.
WIDE = Tile(128, 256, 64, 8, 3)
SQUARE = Tile(128, 128, 64, 8, 3)
#: Exact float32 products use no tensor cores: operands come through registers, so the tile is small.
FLOAT32 = Tile(64, 64, 16, 8, 2)

_GROUP = 8  # tiles of rows that share a run of W in L2
_LEAF = 16


class Emitted(NamedTuple):
    """What beat the thresholds: ``counts[n]`` candidates in row n, of which ``min(counts[n], cap)`` are there."""

    counts: Tensor  # int32 [N], may exceed cap
    pairs: Tensor  # int64 [N, cap] as in saelab_kernels.select, in no particular order


@triton.jit
def _emit(
    pre, rows, first_column, row_thr, col_thr_ptr, count_ptr, pair_ptr, n_tokens, n_features, cap,
    BM: tl.constexpr, BF: tl.constexpr, LEAF: tl.constexpr,
):  # fmt: skip
    if BF <= LEAF:
        columns = first_column + tl.arange(0, BF)
        col_thr = tl.load(col_thr_ptr + columns, mask=columns < n_features, other=0.0)
        # the mask is of positions, not of thresholds: a row with NaN has NaN beyond the last feature as well
        hit = (rows < n_tokens)[:, None] & (columns < n_features)[None, :]
        hit = hit & ~(pre <= row_thr[:, None]) & ~(pre <= col_thr[None, :])
        if tl.max(tl.max(hit.to(tl.int32), 1), 0) > 0:
            ones = tl.full((BM, BF), 1, tl.int32)
            slot = tl.atomic_add(count_ptr + rows[:, None] + 0 * ones, ones, mask=hit, sem="relaxed")
            pair = pack(order_of(pre), columns[None, :] + 0 * ones)
            tl.store(pair_ptr + rows[:, None].to(tl.int64) * cap + slot, pair, mask=hit & (slot < cap))
    else:
        left, right = tl.split(tl.permute(tl.reshape(pre, (BM, 2, BF // 2)), (0, 2, 1)))
        _emit(left, rows, first_column, row_thr, col_thr_ptr, count_ptr, pair_ptr, n_tokens, n_features, cap,
              BM, BF // 2, LEAF)  # fmt: skip
        _emit(right, rows, first_column + BF // 2, row_thr, col_thr_ptr, count_ptr, pair_ptr, n_tokens, n_features, cap,
              BM, BF // 2, LEAF)  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens", "n_features", "cap"])
def _encode_emit(
    x_ptr, w_ptr, b_ptr, row_thr_ptr, col_thr_ptr, count_ptr, pair_ptr, n_tokens, n_features, d, cap,
    BM: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, GROUP: tl.constexpr, LEAF: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # programs that run side by side take GROUP tiles of rows for one tile of W, then the next tile of W
    n_row_tiles, n_column_tiles = tl.cdiv(n_tokens, BM), tl.cdiv(n_features, BF)
    first = tl.program_id(0) // (GROUP * n_column_tiles) * GROUP
    in_group = tl.minimum(n_row_tiles - first, GROUP)
    place = tl.program_id(0) % (GROUP * n_column_tiles)
    rows = (first + place % in_group) * BM + tl.arange(0, BM)
    first_column = (place // in_group) * BF
    columns = first_column + tl.arange(0, BF)

    # positions beyond the end read some row that exists and are masked when emitting: one mask less inside the loop
    x_rows = x_ptr + (rows % n_tokens).to(tl.int64)[:, None] * d
    w_rows = w_ptr + (columns % n_features).to(tl.int64)[None, :] * d
    pre = tl.zeros((BM, BF), tl.float32)
    for start in range(0, d, BD):
        along = start + tl.arange(0, BD)
        x = tl.load(x_rows + along[None, :], mask=(along < d)[None, :], other=0.0)
        w = tl.load(w_rows + along[:, None], mask=(along < d)[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        pre = tl.dot(x, w, pre, input_precision="ieee")
    pre += tl.load(b_ptr + columns, mask=columns < n_features, other=0.0)[None, :]
    row_thr = tl.load(row_thr_ptr + rows, mask=rows < n_tokens, other=0.0)
    _emit(pre, rows, first_column, row_thr, col_thr_ptr, count_ptr, pair_ptr, n_tokens, n_features, cap, BM, BF, LEAF)


def encode_emit(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    row_thr: Tensor | None,
    col_thr: Tensor | None,
    cap: int,
    *,
    tile: Tile | None = None,
) -> Emitted:
    """x [N, d] and W [F, d] of one dtype (bfloat16, float16, float32), b [F], thresholds float32 [N] and [F].

    Nothing further than rounding above both thresholds is missing and nothing further below one is present: rounding is
    4 * 2^-24 * sqrt(d) * |x[n]| * |W[f]|. float32 is multiplied as float32, not as TF32.
    """
    count = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    pair = torch.empty(len(x), cap, dtype=torch.int64, device=x.device)
    if len(x):
        tile = tile or _tile(x.dtype, len(W))
        x, W = _aligned(x), _aligned(W)
        grid = (triton.cdiv(len(x), tile.rows) * triton.cdiv(len(W), tile.columns),)
        _encode_emit[grid](
            x, W, b.float(), _or_none(row_thr, len(x), x.device), _or_none(col_thr, len(W), x.device), count, pair,
            len(x), len(W), x.shape[1], cap,
            BM=tile.rows, BF=tile.columns, BD=tile.depth, GROUP=_GROUP, LEAF=_LEAF, UPCAST=compiled.INTERPRETED,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return Emitted(count, pair)


def _aligned(rows: Tensor) -> Tensor:
    """``rows`` [n, d] with zeros up to a multiple of 16: else they are read value by value, and registers spill."""
    return functional.pad(rows, (0, -rows.shape[1] % 16)).contiguous()


def _or_none(threshold: Tensor | None, length: int, device: torch.device) -> Tensor:
    return torch.full((length,), torch.nan, device=device) if threshold is None else threshold.float().contiguous()


def _tile(dtype: torch.dtype, n_features: int) -> Tile:
    if dtype == torch.float32:
        return FLOAT32
    return WIDE if n_features >= 4096 else SQUARE


def variants() -> list[Variant]:
    """Every way in which the kernel may be launched."""
    return [
        Variant(
            _encode_emit,
            {"x_ptr": f"*{dtype}", "w_ptr": f"*{dtype}", "b_ptr": "*fp32", "row_thr_ptr": "*fp32"}
            | {"col_thr_ptr": "*fp32", "count_ptr": "*i32", "pair_ptr": "*i64"}
            | dict.fromkeys(("n_tokens", "n_features", "d", "cap"), "i32"),
            {"BM": tile.rows, "BF": tile.columns, "BD": tile.depth} | {"GROUP": _GROUP, "LEAF": _LEAF, "UPCAST": False},
            divisible=("d",),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
            uses_mma=dtype != "fp32",
        )
        for dtype, tile in (("bf16", WIDE), ("bf16", SQUARE), ("fp16", WIDE), ("fp16", SQUARE), ("fp32", FLOAT32))
    ]
