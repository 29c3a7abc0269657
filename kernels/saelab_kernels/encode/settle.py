"""The last step of both routes: candidates rescored in one fixed order, and a proof that none is missing.

A feature outside the candidates has an approximate value of at most ``floor``, so it could belong to the k largest only
if its error exceeded (k-th exact value - floor). A row is proven where that gap exceeds SAFETY times the largest error
among its own candidates, the test that encode.cpu makes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import Variant
from saelab_kernels.dots.fused import sampled_dot
from saelab_kernels.select.fused import EMPTY, MAX_K, index_in, order_in, order_of, pack, value_of, warps

SAFETY = 2.0


class Settled(NamedTuple):
    values: Tensor  # float32 [N, k], exact, largest first, equal values by ascending index
    indices: Tensor  # int64 [N, k]
    proven: Tensor  # bool [N]


@triton.jit
def _settle(
    dot_ptr, approx_ptr, index_ptr, b_ptr, value_out_ptr, index_out_ptr, proven_ptr, keep, k, safety, K: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, K)
    live = slots < keep
    index = tl.load(index_ptr + row * keep + slots, mask=live, other=0)
    exact = tl.load(dot_ptr + row * keep + slots, mask=live, other=0.0)
    exact += tl.load(b_ptr + index, mask=live, other=0.0)
    approx = tl.load(approx_ptr + row * keep + slots, mask=live, other=0.0)
    error = tl.abs(exact - approx)
    alike = (exact == approx) | ((exact != exact) & (approx != approx))  # infinite or NaN both times is no error
    error = tl.where(alike, 0.0, error)
    error = tl.where(error == error, error, float("inf"))  # NaN once proves nothing, and a maximum might drop it
    worst = tl.max(tl.where(live, error, 0.0), 0)

    pairs = tl.where(live, pack(order_of(exact), index.to(tl.int32)), EMPTY)
    pairs = tl.sort(pairs, descending=True)
    values = value_of(order_in(pairs))
    tl.store(value_out_ptr + row * k + slots, values, mask=slots < k)
    tl.store(index_out_ptr + row * k + slots, index_in(pairs), mask=slots < k)

    floor = tl.load(approx_ptr + row * keep + keep - 1)
    kth = tl.sum(tl.where(slots == k - 1, values, 0.0), 0)
    tl.store(proven_ptr + row, (kth - floor > safety * worst).to(tl.int8))


def settle(x: Tensor, W: Tensor, b: Tensor, approx: Tensor, indices: Tensor, k: int) -> Settled:
    """The k largest of the candidates ``indices`` int64 [N, keep] by their exact pre-activations.

    x [N, d], W [F, d], b float32 [F]; ``approx`` [N, keep] are the values by which the candidates were found, the last
    one the smallest: no other feature's approximate value is above it.
    """
    n_tokens, keep = indices.shape
    values = torch.empty(n_tokens, k, device=x.device)
    chosen = torch.empty(n_tokens, k, dtype=torch.int64, device=x.device)
    proven = torch.empty(n_tokens, dtype=torch.int8, device=x.device)
    if n_tokens:
        padded = triton.next_power_of_2(keep)
        _settle[n_tokens,](
            sampled_dot(x, W, indices), approx, indices, b, values, chosen, proven, keep, k, SAFETY,
            K=padded, num_warps=warps(padded),
        )  # fmt: skip
    every = keep == len(W)  # then nothing can be missing
    return Settled(values, chosen, torch.ones_like(proven, dtype=torch.bool) if every else proven.bool())


def variants() -> list[Variant]:
    """Every way in which the kernel may be launched with enough candidates."""
    return [
        Variant(
            _settle,
            {"dot_ptr": "*fp32", "approx_ptr": "*fp32", "index_ptr": "*i64", "b_ptr": "*fp32", "value_out_ptr": "*fp32"}
            | {"index_out_ptr": "*i64", "proven_ptr": "*i8", "keep": "i32", "k": "i32", "safety": "fp32"},
            {"K": k},
            options={"num_warps": warps(k)},
        )
        for k in (16, 64, 128, 256, 512, MAX_K)
    ]
