"""The n-th largest of a long vector, eight bits of its order at a time, without sorting and without a host sync.

Each of four passes counts one digit of the values that agree with the digits found so far; the digit in which the n-th
falls is the next one found. Bins are added to by integer atomics, whose sum has no order, so the result is exact and
the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import Variant
from saelab_kernels.select.fused import code_of, order_of

_BLOCK = 2048
_BINS = tl.constexpr(256)


@triton.jit
def _count_digits(value_ptr, prefix_ptr, bin_ptr, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Add to bins [256] the digit at bit SHIFT of every value whose higher digits are those of the prefix."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < n
    code = code_of(order_of(tl.load(value_ptr + places, mask=inside, other=0.0)))
    if SHIFT < 24:
        prefix = tl.load(prefix_ptr).to(tl.uint32)
        inside = inside & ((code >> (SHIFT + 8)) == (prefix >> (SHIFT + 8)))
    digits = ((code >> SHIFT) & 0xFF).to(tl.int32)
    counts = tl.histogram(digits, _BINS, mask=inside)
    tl.atomic_add(bin_ptr + tl.arange(0, _BINS), counts, mask=counts > 0, sem="relaxed")


def batch_threshold(values: Tensor, n_keep: int) -> Tensor:
    """The ``n_keep``-th largest of float32 ``values`` [P], a tensor without axes. NaN counts as the largest.

    Raises:
        ValueError: n_keep is not in 1..P.
    """
    if not 1 <= n_keep <= len(values):
        raise ValueError(f"n_keep must be between 1 and the {len(values)} values, got {n_keep}")
    values = values.contiguous()
    prefix = torch.zeros((), dtype=torch.int64, device=values.device)
    wanted = torch.full_like(prefix, n_keep)
    for shift in (24, 16, 8, 0):
        bins = torch.zeros(_BINS.value, dtype=torch.int32, device=values.device)
        grid = (triton.cdiv(len(values), _BLOCK),)
        _count_digits[grid](values, prefix, bins, len(values), SHIFT=shift, BLOCK=_BLOCK, num_warps=4)
        reaching = bins.long().flip(0).cumsum(0)  # [i]: how many have digit 255 - i or more
        place = (reaching < wanted).sum()
        higher = torch.where(place > 0, reaching.gather(0, (place - 1).clamp_min(0).view(1))[0], 0)
        wanted = wanted - higher
        prefix = prefix | ((255 - place) << shift)
    order = prefix - 2**31
    bits = torch.where(order < 0, order ^ 0x7FFFFFFF, order)
    return bits.to(torch.int32).view(torch.float32)


def variants() -> list[Variant]:
    """Every way in which the kernel may be launched."""
    arguments = {"value_ptr": "*fp32", "prefix_ptr": "*i64", "bin_ptr": "*i32", "n": "i32"}
    return [Variant(_count_digits, arguments, {"SHIFT": shift, "BLOCK": _BLOCK}) for shift in (24, 16, 8, 0)]
