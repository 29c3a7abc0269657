"""The k largest of each row of candidates, whatever order they arrived in.

A candidate is one 64-bit integer: its value as an integer of the same order in the upper half, 2^31 - 1 - index in the
lower. So one comparison decides by value first and then for the lower index, and sorting candidates sorts the pairs.

    order(v) = bits of v           v >= 0
               bits of v ^ 2^31-1  v < 0    (the magnitude runs backwards)
               0                   v = -0   (it ties with 0)
               2^31 - 1            NaN      (above +infinity)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import Variant

#: Below every candidate: -infinity has an order of its own above it.
EMPTY = tl.constexpr(-(2**63))

#: The k of a row are sorted in registers, by code that grows with k: 170 KB at 1024.
MAX_K = 1024

_PIECE = 256  # candidates that a warp compares at a time; the encoders leave 200 to 400 in a row


class Selected(NamedTuple):
    """The k largest of each row, largest first, equal values by ascending index; (-inf, 0) where a row has fewer."""

    values: Tensor  # float32 [N, k]
    indices: Tensor  # int64 [N, k]
    kth: Tensor  # float32 [N], the smallest of them


@triton.jit
def order_of(value):
    """Integers of 32 bits in the order of the float32 ``value``."""
    bits = value.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(value == 0, 0, order)
    return tl.where(value == value, order, 0x7FFFFFFF)


@triton.jit
def value_of(order):
    """The float32 that has this place in the order."""
    bits = tl.where(order < 0, order ^ 0x7FFFFFFF, order)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def code_of(order):
    """The same order as unsigned integers, for searches that fix one bit after the other."""
    return order.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def order_of_code(code):
    return (code ^ 0x80000000).to(tl.int32, bitcast=True)


@triton.jit
def pack(order, index):
    """One candidate from an order and a non-negative int32 index."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def order_in(pair):
    return (pair >> 32).to(tl.int32)


@triton.jit
def index_in(pair):
    return (0x7FFFFFFF - (pair & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _select_topk(
    pair_ptr, count_ptr, value_ptr, index_ptr, kth_ptr, cap, k, K: tl.constexpr, PIECE: tl.constexpr
):  # fmt: skip
    """A border that k pairs reach, bit by bit, by counting; then a sort of those: no pair is sorted to be dropped."""
    row = tl.program_id(0).to(tl.int64)
    pair_ptr += row * cap
    count = tl.minimum(tl.load(count_ptr + row), cap)
    slots = tl.arange(0, PIECE)
    lowest = tl.full((), 0x8000000000000000, tl.uint64)
    border = tl.full((), 0, tl.uint64)
    bit = lowest
    at_border = count
    while (at_border > k) & (bit != 0):
        reaching = tl.full((), 0, tl.int32)
        for start in range(0, count, PIECE):  # from the L1 cache all but the first time
            pairs = tl.load(pair_ptr + start + slots, mask=start + slots < count, other=EMPTY)
            codes = pairs.to(tl.uint64, bitcast=True) ^ lowest
            reaching += tl.sum((codes >= (border | bit)).to(tl.int32), 0)
        if reaching >= k:
            border = border | bit
            at_border = reaching
        bit = bit >> 1

    found = tl.full((), 0, tl.int32)
    for start in range(0, count, PIECE):
        live = start + slots < count
        pairs = tl.load(pair_ptr + start + slots, mask=live, other=EMPTY)
        chosen = live & ((pairs.to(tl.uint64, bitcast=True) ^ lowest) >= border)
        # the room for the indices serves to gather the pairs: they are one program's and of the same size
        tl.store(index_ptr + row * k + found + tl.cumsum(chosen.to(tl.int32), 0) - 1, pairs, mask=chosen)
        found += tl.sum(chosen.to(tl.int32), 0)
    tl.debug_barrier()
    places = tl.arange(0, K)
    best = tl.load(index_ptr + row * k + places, mask=places < found, other=EMPTY)
    tl.debug_barrier()
    best = tl.sort(best, descending=True)
    values = tl.where(places < found, value_of(order_in(best)), float("-inf"))
    tl.store(value_ptr + row * k + places, values, mask=places < k)
    tl.store(index_ptr + row * k + places, tl.where(places < found, index_in(best), 0), mask=places < k)
    tl.store(kth_ptr + row + 0 * places, values, mask=places == k - 1)


def select_topk(pair: Tensor, count: Tensor, k: int) -> Selected:
    """pair int64 [N, cap], of which the first ``min(count[n], cap)`` of row n are candidates; count int32 [N].

    No index appears twice in a row.

    Raises:
        ValueError: k is not in 1..MAX_K.
    """
    if not 1 <= k <= MAX_K:
        raise ValueError(f"select_topk takes 1 to {MAX_K} of a row, got k={k}; use torch.topk")
    n_rows, cap = pair.shape
    values = torch.empty(n_rows, k, device=pair.device)
    indices = torch.empty(n_rows, k, dtype=torch.int64, device=pair.device)
    kth = torch.empty(n_rows, device=pair.device)
    if n_rows:
        padded = triton.next_power_of_2(k)
        _select_topk[n_rows,](
            pair.contiguous(), count, values, indices, kth, cap, k,
            K=padded, PIECE=_PIECE * warps(padded), num_warps=warps(padded),
        )  # fmt: skip
    return Selected(values, indices, kth)


def warps(n_sorted: int) -> int:
    """Warps for one program that sorts so many candidates: 4 in a thread. With 16, ptxas takes a minute."""
    return max(1, n_sorted // 128)


def variants() -> list[Variant]:
    """Every way in which the kernel may be launched for 64 candidates or more; fewer are sorted by the same code."""
    pointers = {"pair_ptr": "*i64", "count_ptr": "*i32", "value_ptr": "*fp32", "index_ptr": "*i64", "kth_ptr": "*fp32"}
    return [
        Variant(
            _select_topk,
            pointers | {"cap": "i32", "k": "i32"},
            {"K": k, "PIECE": _PIECE * warps(k)},
            divisible=("cap",),
            options={"num_warps": warps(k)},
        )
        for k in (16, 64, 128, 256, 512, MAX_K)
    ]
