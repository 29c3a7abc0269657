"""Log-probabilities of given tokens on a GPU, the vocabulary a tile at a time.

Forward, one kernel: a program owns ROWS tokens and a stretch of the vocabulary, multiplies tile by tile, and keeps of
each token the maximum, the sum of exp(logit - maximum) and the target's logit. Stretches are put together in their
order, so two runs give the same bits.

Backward, for each slab of a few thousand columns: one kernel makes the logits again and stores

    D[n, v] = g[n] ([v = targets[n]] - exp(l[n, v] - lse[n]))

in the dtype of the inputs; then dL/dhidden += D @ W_U[slab] and dL/dW_U[slab] = D.T @ hidden are products of cuBLAS
with float32 results. One Triton program could make both only by adding into one of the gradients from many programs,
with atomics or another pass. D, written once and read twice in bfloat16, is 6 N V bytes beside 6 N V d floating-point
operations: at 790 TFLOP/s and 4.3 TB/s 8 % of the time at d = 2304, and 32 % at d = 576 were it not in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import INTERPRETED, Variant
from saelab_kernels.logps.cpu import Logps

SLAB_BYTES = 2**27  # of D: 16,384 tokens x 4096 columns in bfloat16
MAX_ROWS = 2**14
PROGRAMS = 1024  # several for each multiprocessor; a constant, so that the order of adding depends on shapes alone


class Tile(NamedTuple):
    """How a kernel is cut; of the shapes tried here, the largest that neither sm_80 nor sm_90 spills."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    options: dict[str, int]


HALF = Tile(128, 128, 64, {"num_warps": 8, "num_stages": 3})
#: For a width that is no multiple of 16, whose rows are loaded an element at a time.
HALF_ODD = Tile(128, 64, 32, {"num_warps": 8, "num_stages": 2})
#: float32 products without tensor cores, whose operands stay in registers.
FLOAT = Tile(64, 64, 32, {"num_warps": 8, "num_stages": 2})


@triton.jit
def tile_logits(
    hidden_ptr, weights_ptr, n_rows, n_columns, d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The first ROWS rows at ``hidden_ptr`` times the first COLUMNS at ``weights_ptr``, float32; 0 beyond n of them."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, d, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth < d
        left = tl.load(
            hidden_ptr + rows[:, None] * d + depth[None, :], mask=(rows < n_rows)[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            weights_ptr + columns[None, :] * d + depth[:, None],
            mask=(columns < n_columns)[None, :] & inside[:, None],
            other=0.0,
        )
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        logits = tl.dot(left, right, logits, input_precision="ieee")
    return logits


@triton.jit
def _stretch_logsumexp(
    hidden_ptr, weights_ptr, targets_ptr, maximum_ptr, total_ptr, at_target_ptr, n_rows, n_columns, d, tiles_each,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Three numbers for each token and stretch of ``tiles_each`` tiles, [stretches, n_rows]."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS  # int64: products with d pass 2^31; within a tile they do not
    rows = first_row + tl.arange(0, ROWS)
    stretch = tl.program_id(1)
    target = tl.load(targets_ptr + rows, mask=rows < n_rows, other=-1).to(tl.int32)
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    at_target = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    last = tl.minimum((stretch + 1) * tiles_each, tl.cdiv(n_columns, COLUMNS))
    for tile in range(stretch * tiles_each, last):
        first_column = tile * COLUMNS
        logits = tile_logits(
            hidden_ptr + first_row * d, weights_ptr + tl.cast(first_column, tl.int64) * d,
            n_rows - first_row, n_columns - first_column, d, ROWS, COLUMNS, DEPTH, UPCAST,
        )  # fmt: skip
        columns = first_column + tl.arange(0, COLUMNS)
        logits = tl.where((columns < n_columns)[None, :], logits, float("-inf"))
        hit = tl.where(columns[None, :] == target[:, None], logits, float("-inf"))
        at_target = tl.maximum(at_target, tl.max(hit, axis=1))
        largest = tl.maximum(maximum, tl.max(logits, axis=1))
        shift = tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf would be NaN, and stay
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        maximum = largest
    places = stretch.to(tl.int64) * n_rows + rows
    tl.store(maximum_ptr + places, maximum, mask=rows < n_rows)
    tl.store(total_ptr + places, total, mask=rows < n_rows)
    tl.store(at_target_ptr + places, at_target, mask=rows < n_rows)


@triton.jit
def _logits_gradient(
    hidden_ptr, weights_ptr, targets_ptr, logsumexp_ptr, grad_ptr, out_ptr, n_rows, n_columns, d, slab_start,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """D [n_rows, n_columns] of the slab of the vocabulary from ``slab_start`` on, to which ``weights_ptr`` points."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    logits = tile_logits(
        hidden_ptr + first_row * d, weights_ptr + first_column * d,
        n_rows - first_row, n_columns - first_column, d, ROWS, COLUMNS, DEPTH, UPCAST,
    )  # fmt: skip
    rows, columns = first_row + tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    live = rows < n_rows
    target = tl.load(targets_ptr + rows, mask=live, other=-1) - slab_start
    logsumexp = tl.load(logsumexp_ptr + rows, mask=live, other=0.0)
    grad = tl.load(grad_ptr + rows, mask=live, other=0.0)
    delta = tl.where(columns[None, :] == target[:, None], 1.0, 0.0) - tl.exp(logits - logsumexp[:, None])
    tl.store(
        out_ptr + rows[:, None] * n_columns + columns[None, :],
        (delta * grad[:, None]).to(out_ptr.dtype.element_ty),
        mask=live[:, None] & (columns < n_columns)[None, :],
    )


def token_logps(hidden: Tensor, W_U: Tensor, targets: Tensor) -> Logps:
    """hidden [N, d], W_U [V, d] of one dtype, targets int64 [N] -> float32. A target outside of 0..V-1 gives NaN."""
    n_tokens, n_vocabulary = len(hidden), len(W_U)
    if not n_tokens:
        return Logps(hidden.new_empty(0, dtype=torch.float32), hidden.new_empty(0, dtype=torch.float32))
    tile = _tile(hidden)
    row_blocks, tiles = triton.cdiv(n_tokens, tile.ROWS), triton.cdiv(n_vocabulary, tile.COLUMNS)
    tiles_each = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // row_blocks)))
    stretches = triton.cdiv(tiles, tiles_each)
    maximum, total, at_target = hidden.new_empty(3, stretches, n_tokens, dtype=torch.float32)
    _stretch_logsumexp[(row_blocks, stretches)](
        hidden, W_U, targets, maximum, total, at_target, n_tokens, n_vocabulary, hidden.shape[1], tiles_each,
        UPCAST=INTERPRETED, **_constants(tile), **tile.options,
    )  # fmt: skip
    largest = maximum.amax(0)
    logsumexp = largest + (total * (maximum - largest).exp()).sum(0).log()
    outside = (targets < 0) | (targets >= n_vocabulary)
    return Logps((at_target.amax(0) - logsumexp).masked_fill(outside, torch.nan), logsumexp)


def gradients(
    grad: Tensor, hidden: Tensor, W_U: Tensor, targets: Tensor, logsumexp: Tensor, *, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dhidden [N, d] and dL/dW_U [V, d], those that are needed, from dL/dlogps ``grad`` [N]."""
    tile = _tile(hidden)
    hidden_grad = torch.zeros_like(hidden, dtype=torch.float32) if need[0] else None
    W_grad = torch.zeros_like(W_U, dtype=torch.float32 if len(hidden) > MAX_ROWS else None) if need[1] else None
    for rows in _parts(len(hidden), MAX_ROWS):
        x = hidden[rows]
        for columns in _parts(len(W_U), max(tile.COLUMNS, SLAB_BYTES // (hidden.itemsize * len(x)))):
            weights = W_U[columns]
            delta = hidden.new_empty(len(x), len(weights))
            grid = (triton.cdiv(len(x), tile.ROWS), triton.cdiv(len(weights), tile.COLUMNS))
            _logits_gradient[grid](
                x, weights, targets[rows], logsumexp[rows], grad[rows], delta,
                len(x), len(weights), hidden.shape[1], columns.start,
                UPCAST=INTERPRETED, **_constants(tile), **tile.options,
            )  # fmt: skip
            if hidden_grad is not None:
                hidden_grad[rows] += _product(delta, weights)
            if W_grad is not None:
                W_grad[columns] += _product(delta.T, x)
    return (
        None if hidden_grad is None else hidden_grad.to(hidden.dtype),
        None if W_grad is None else W_grad.to(W_U.dtype),
    )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in float32."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _parts(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _tile(hidden: Tensor) -> Tile:
    if hidden.dtype == torch.float32:
        return FLOAT
    return HALF if hidden.shape[1] % 16 == 0 else HALF_ODD


def _constants(tile: Tile) -> dict[str, int]:
    return {"ROWS": tile.ROWS, "COLUMNS": tile.COLUMNS, "DEPTH": tile.DEPTH}


def variants() -> list[Variant]:
    """Every way in which the kernels are launched."""
    launches: list[tuple[str, Tile, tuple[str, ...]]]
    launches = [(name, HALF, divisible) for name in ("bf16", "fp16") for divisible in (("d", "n_columns"), ("d",))]
    launches += [(name, HALF_ODD, ()) for name in ("bf16", "fp16")]
    launches += [("fp32", FLOAT, divisible) for divisible in (("d", "n_columns"), ("d",), ())]
    return [variant for launch in launches for variant in _variants(*launch)]


def _variants(dtype: str, tile: Tile, divisible: tuple[str, ...]) -> Iterator[Variant]:
    inputs = {"hidden_ptr": f"*{dtype}", "weights_ptr": f"*{dtype}", "targets_ptr": "*i64"}
    partial = {"maximum_ptr": "*fp32", "total_ptr": "*fp32", "at_target_ptr": "*fp32"}
    factors = {"logsumexp_ptr": "*fp32", "grad_ptr": "*fp32", "out_ptr": f"*{dtype}"}
    sizes = {"n_rows": "i32", "n_columns": "i32", "d": "i32"}
    how: dict[str, Any] = {
        "constants": {**_constants(tile), "UPCAST": False},
        "divisible": divisible,
        "options": tile.options,
        "uses_mma": dtype != "fp32",
    }
    yield Variant(_stretch_logsumexp, {**inputs, **partial, **sizes, "tiles_each": "i32"}, **how)
    yield Variant(_logits_gradient, {**inputs, **factors, **sizes, "slab_start": "i32"}, **how)
