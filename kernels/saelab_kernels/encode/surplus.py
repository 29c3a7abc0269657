"""Every pre-activation above its feature's floor, and the few that rounding might have kept from it.

    candidate where  not (approx + slack <= floor[f])
    slack = u |approx - b| + 2^-22 |approx| + spread |x[n]| |W[f]|

with u the relative rounding of the product's output, to which the bias comes in float32. ``spread`` bounds the error of
the sum, as a share of the largest value that it could have (Cauchy and Schwarz). One program owns a token and appends
in ascending order of features, so the result is in order as it stands: no atomics, no sort. Infinity and NaN make the
slack or the comparison such that the candidate is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import Variant
from saelab_kernels.encode.stream import BLOCK, chunks
from saelab_kernels.ragged import Ragged
from saelab_kernels.select.fused import index_in, order_in, order_of, pack, value_of

_COPY_BLOCK = 128


@triton.jit
def _append_above(
    chunk_ptr, b_ptr, floor_ptr, x_norm_ptr, w_norm_ptr, count_ptr, pair_ptr, width, first, cap, rounding, spread,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    reach = spread * tl.load(x_norm_ptr + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(chunk_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = rounding * tl.abs(value)  # the product was rounded before the bias came to it
        value += tl.load(b_ptr + first + columns, mask=inside, other=0.0)
        slack = (
            rounded + 2.0**-22 * tl.abs(value) + reach * tl.load(w_norm_ptr + first + columns, mask=inside, other=0.0)
        )
        floor = tl.load(floor_ptr + first + columns, mask=inside, other=0.0)
        hit = inside & ~(value + slack <= floor)
        n_hits = tl.sum(hit.to(tl.int32), 0)
        if n_hits > 0:
            slots = count + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(pair_ptr + row * cap + slots, pack(order_of(value), first + columns), mask=hit & (slots < cap))
            count += n_hits
    tl.store(count_ptr + row, count)


@triton.jit
def _copy_rows(row_ptr, pair_ptr, offset_ptr, value_ptr, feature_ptr, cap, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + place)
    begin, end = tl.load(offset_ptr + row), tl.load(offset_ptr + row + 1)
    for start in range(begin, end, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        there = (slots < end) & (slots - begin < cap)
        pair = tl.load(pair_ptr + place * cap + slots - begin, mask=there, other=0)
        tl.store(value_ptr + slots, value_of(order_in(pair)), mask=there)
        tl.store(feature_ptr + slots, index_in(pair), mask=there)


def emit_above(
    x: Tensor, W: Tensor, b: Tensor, floor: Tensor, *, norms: tuple[Tensor, Tensor], spread: float, cap: int
) -> Ragged:
    """Candidates with their approximate values, by token and then by feature. Waits for the device to size the result.

    x [N, d], W [F, d] of one dtype, b and floor float32 [F], ``norms`` the lengths of the rows of x and W, float32 [N]
    and [F]. ``cap`` candidates a token are provided for; tokens that have more are done once more with enough.
    """
    total = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    parts: list[tuple[Tensor, Tensor]] = []
    rows, room = torch.arange(len(x), device=x.device), min(cap, len(W))
    while len(rows):
        count, pair = _append(x[rows] if parts else x, W, b, floor, (norms[0][rows], norms[1]), spread, room)
        total[rows] = count
        parts.append((rows, pair))
        rows = rows[count > room]
        if len(rows):  # another batch may be rounded otherwise, hence a little more than was counted
            room = min(len(W), int(count.max()) + 64)
    offsets = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    offsets[1:] = total.cumsum(0)
    n_pairs = int(offsets[-1])
    values = torch.empty(n_pairs, device=x.device)
    features = torch.empty(n_pairs, dtype=torch.int64, device=x.device)
    for rows, pair in parts:  # a later part has all of a row of which an earlier one has the beginning
        _copy_rows[len(rows),](rows, pair, offsets, values, features, pair.shape[1], BLOCK=_COPY_BLOCK, num_warps=1)
    return Ragged(values, features, offsets)


def _append(
    x: Tensor, W: Tensor, b: Tensor, floor: Tensor, norms: tuple[Tensor, Tensor], spread: float, cap: int
) -> tuple[Tensor, Tensor]:
    """int32 [N] how many candidates each token has, and int64 [N, cap] the first of them."""
    count = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    pair = torch.empty(len(x), cap, dtype=torch.int64, device=x.device)
    # a product of 16 bits is rounded to 16 bits; one of float32 is as exact as its sum, which ``spread`` covers
    rounding = torch.finfo(x.dtype).eps / 2 * 1.01 if x.element_size() == 2 else 0.0
    for first, chunk in chunks(x, W):
        _append_above[len(x),](
            chunk, b, floor, norms[0].contiguous(), norms[1], count, pair, chunk.shape[1], first, cap, rounding, spread,
            BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
    return count, pair


def variants() -> list[Variant]:
    """Every way in which the kernels may be launched."""
    append = {"b_ptr": "*fp32", "floor_ptr": "*fp32", "x_norm_ptr": "*fp32", "w_norm_ptr": "*fp32"}
    append |= {"count_ptr": "*i32", "pair_ptr": "*i64", "width": "i32", "first": "i32", "cap": "i32"}
    copy = {"row_ptr": "*i64", "pair_ptr": "*i64", "offset_ptr": "*i64", "value_ptr": "*fp32", "feature_ptr": "*i64"}
    return [
        *(
            Variant(
                _append_above,
                {"chunk_ptr": f"*{dtype}"} | append | {"rounding": "fp32", "spread": "fp32"},
                {"BLOCK": BLOCK},
                divisible=divisible,
                options={"num_warps": 1},
            )
            for dtype in ("bf16", "fp16", "fp32")
            for divisible in ((), ("width", "first", "cap"))
        ),
        Variant(_copy_rows, copy | {"cap": "i32"}, {"BLOCK": _COPY_BLOCK}, options={"num_warps": 1}),
    ]
