"""Route A's two halves: a matrix product some features at a time, and the running k largest of what passes by.

A chunk of pre-activations, 16 MB, is still in the L2 cache when the next kernel reads it, so selection costs no trip to
memory. One program owns a token: it appends what beats the token's floor to a pool, and when the pool might not hold
another block it keeps the ``keep`` largest and raises the floor to what they alone reach. The pool never overflows, and
since features arrive in ascending order it stays in that order: of equal values those already there win, as they must.
The new floor is found bit by bit, by counting, until exactly ``keep`` reach it: cheaper than a sort, and no index has
to move until the border is known.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import Variant
from saelab_kernels.select.fused import EMPTY, MAX_K, code_of, order_in, order_of, order_of_code, pack, value_of

#: Features that one step of a program reads: eight for each thread of one warp, 16 bytes of bfloat16.
BLOCK = 256
#: Tokens at a time: with 16 MB chunks a product then has 1024 features, enough tiles for 132 processors.
ROWS = 8192
#: One chunk; half of what an H100 keeps in L2, with room for the operands.
CHUNK_BYTES = 2**24


def search_dtype(W: Tensor) -> torch.dtype:
    """The dtype in which candidates are sought: 16 bits, whatever is rescored."""
    return W.dtype if W.element_size() == 2 else torch.bfloat16


def chunks(x: Tensor, W: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First feature and pre-activations [N, C] without bias of consecutive features; the buffer is used again."""
    n_features = len(W)
    width = min(n_features, max(BLOCK, CHUNK_BYTES // (x.element_size() * len(x)) // BLOCK * BLOCK))
    buffer = x.new_empty(len(x) * width)
    for first in range(0, n_features, width):
        part = W[first : first + width]
        chunk = buffer[: len(x) * len(part)].view(len(x), len(part))
        torch.mm(x, part.T, out=chunk)
        yield first, chunk


@triton.jit
def _cut(pair_ptr, count, keep, POOL: tl.constexpr):
    """Leave the ``keep`` largest of ``count`` candidates in the order they are in; a floor for them and their count."""
    tl.debug_barrier()  # what other threads appended must have arrived
    slots = tl.arange(0, POOL)
    pairs = tl.load(pair_ptr + slots, mask=slots < count, other=EMPTY)
    codes = code_of(order_in(pairs))
    border = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    at_border = count
    while (at_border > keep) & (bit != 0):
        reaching = tl.sum((codes >= (border | bit)).to(tl.int32), 0)
        if reaching >= keep:
            border = border | bit
            at_border = reaching
        bit = bit >> 1
    above = codes > border
    level = codes == border
    room = keep - tl.sum(above.to(tl.int32), 0)
    kept = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))
    tl.debug_barrier()  # and have been read by all before any is overwritten
    tl.store(pair_ptr + tl.cumsum(kept.to(tl.int32), 0) - 1, pairs, mask=kept)
    return value_of(order_of_code(border)), tl.sum(kept.to(tl.int32), 0)


@triton.jit
def _keep_largest(
    chunk_ptr, b_ptr, floor_ptr, count_ptr, pair_ptr, width, first, keep, POOL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunk_ptr += row * width
    pair_ptr += row * POOL
    floor, count = tl.load(floor_ptr + row), tl.load(count_ptr + row)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        value = tl.load(chunk_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        value += tl.load(b_ptr + first + columns, mask=inside, other=0.0)
        hit = inside & ~(value <= floor)  # true for NaN, and for all while the floor is NaN
        n_hits = tl.sum(hit.to(tl.int32), 0)
        if n_hits > 0:
            slots = count + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(pair_ptr + slots, pack(order_of(value), first + columns), mask=hit)
            count += n_hits
            if count > POOL - BLOCK:
                floor, count = _cut(pair_ptr, count, keep, POOL)
    tl.store(floor_ptr + row, floor)
    tl.store(count_ptr + row, count)


def running_largest(x: Tensor, W: Tensor, b: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """x [N, d], W [F, d] of one dtype, b float32 [F] -> int32 count [N] and candidates int64 [N, pool].

    The candidates are in ascending order of features and hold the ``keep`` largest pre-activations, in the precision of
    the product, and more. ``keep`` is in 1..min(F, MAX_K).
    """
    pool = _pool(keep)
    floor = torch.full((len(x),), torch.nan, device=x.device)
    count = torch.zeros(len(x), dtype=torch.int32, device=x.device)
    pair = torch.empty(len(x), pool, dtype=torch.int64, device=x.device)
    for first, chunk in chunks(x, W) if len(x) else ():
        _keep_largest[len(x),](
            chunk, b, floor, count, pair, chunk.shape[1], first, keep, POOL=pool, BLOCK=BLOCK, num_warps=_warps(pool)
        )
    return count, pair


def _pool(keep: int) -> int:
    """Room for twice what is kept and one more block: a cut then frees at least half."""
    return triton.next_power_of_2(2 * keep + BLOCK)


def _warps(pool: int) -> int:
    """One where the pool allows it, so that sums need no barrier; at most 16 candidates in a thread."""
    return pool // 512


def variants() -> list[Variant]:
    """Every way in which the kernel may be launched."""
    return [
        Variant(
            _keep_largest,
            {"chunk_ptr": f"*{dtype}", "b_ptr": "*fp32", "floor_ptr": "*fp32", "count_ptr": "*i32", "pair_ptr": "*i64"}
            | {"width": "i32", "first": "i32", "keep": "i32"},
            {"POOL": pool, "BLOCK": BLOCK},
            divisible=divisible,
            options={"num_warps": _warps(pool)},
        )
        for dtype in ("bf16", "fp16", "fp32")
        for pool in (512, 1024, 2048, _pool(MAX_K))
        for divisible in ((), ("width", "first"))
    ]
