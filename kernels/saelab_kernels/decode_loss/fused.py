"""Reconstruction loss on a GPU: one program for each token and tile of columns reads the rows of W_dec for both uses.

    e_p[n, c] = sum over entries j of groups 0 .. p of acts[n, j] W_dec[i[n, j], c] + b_dec[c] - target[n, c]
    errors[p] = e_p + e_(p+1) + ... ,  loss[n] = sum_p sum_c e_p[n, c]^2
    acts_grad[n, j] = 2 sum_c errors[group of j, n, c] W_dec[i[n, j], c]

An error's column needs the same rows that its dot products do, so a tile is finished by itself. Up to 128 entries are
held in registers and read once (``_whole_rows``). Otherwise, and with prefixes, they are read again at once, when the
slices (k * 512 bytes of bfloat16) are still in the cache (``_by_prefix``). Sums over columns are left as one partial
for each tile, [d / WIDTH, N, k], which ``_add_tiles`` adds in order; as in decoding, tokens vary faster than tiles.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from saelab_kernels.compiled import Variant
from saelab_kernels.decode.fused import WIDTH, add_rows
from saelab_kernels.decode_loss import reference
from saelab_kernels.dots.fused import SLOTS, fold

#: Entries of a token -> (width of the tile, warps): 8192 numbers, 32 registers for each thread, 16 kB in flight
_TILES = {16: (256, 4), 32: (256, 8), 64: (128, 8), 128: (64, 8)}
_ROWS = 4  # rows in flight, for each of two warps, when entries are read twice; with eight ptxas spills
_ADDED = 1024  # elements that a program of _add_tiles adds


@triton.jit
def _whole_rows(
    acts_ptr, features_ptr, weights_ptr, bias_ptr, target_ptr, error_ptr, loss_ptr, dots_ptr, n_tokens, k, d,
    ENTRIES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tile * WIDTH + tl.arange(0, WIDTH)
    inside = columns < d
    entries = tl.arange(0, ENTRIES)
    live = entries < k
    features = tl.load(features_ptr + token * k + entries, mask=live, other=0).to(tl.int64)
    acts = tl.load(acts_ptr + token * k + entries, mask=live, other=0.0).to(tl.float32)
    rows = tl.load(
        weights_ptr + features[:, None] * d + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0
    ).to(tl.float32)
    error = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    error -= tl.load(target_ptr + token * d + columns, mask=inside, other=0.0).to(tl.float32)
    error += tl.sum(rows * acts[:, None], axis=0)
    tl.store(error_ptr + token * d + columns, error, mask=inside)
    tl.store(loss_ptr + tile * n_tokens + token, tl.sum(error * error, axis=0))
    dots = fold(rows * error[None, :], ENTRIES, WIDTH)
    tl.store(dots_ptr + (tile * n_tokens + token) * k + entries, dots, mask=live)


@triton.jit
def _by_prefix(
    acts_ptr, features_ptr, cuts_ptr, weights_ptr, bias_ptr, target_ptr, errors_ptr, loss_ptr, dots_ptr, n_tokens, k, d,
    n_groups, plane, ROWS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # features ascend within a row; group p of token n owns its entries cuts[n, p] .. cuts[n, p + 1] - 1
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns = tile * WIDTH + tl.arange(0, WIDTH)
    inside = columns < d
    cuts_ptr += token * (n_groups + 1)
    errors_ptr += token * d
    error = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    error -= tl.load(target_ptr + token * d + columns, mask=inside, other=0.0).to(tl.float32)
    squares = tl.zeros((WIDTH,), tl.float32)
    for group in range(n_groups):
        first, last = token * k + tl.load(cuts_ptr + group), token * k + tl.load(cuts_ptr + group + 1)
        error = add_rows(error, acts_ptr, features_ptr, weights_ptr, first, last, columns, d, ROWS)
        squares += error * error
        tl.store(errors_ptr + columns, error, mask=inside)
        errors_ptr += plane
    tl.store(loss_ptr + tile * n_tokens + token, tl.sum(squares, axis=0))

    tl.debug_barrier()  # the thread that reads an error below need not be the one that wrote it
    total = tl.zeros((WIDTH,), tl.float32)
    for back in range(n_groups):
        group = n_groups - 1 - back
        errors_ptr -= plane
        total += tl.load(errors_ptr + columns, mask=inside, other=0.0)
        tl.store(errors_ptr + columns, total, mask=inside)
        first, last = token * k + tl.load(cuts_ptr + group), token * k + tl.load(cuts_ptr + group + 1)
        for start in range(first, last, SLOTS):
            entries = start + tl.arange(0, SLOTS)
            live = entries < last
            features = tl.load(features_ptr + entries, mask=live, other=0).to(tl.int64)
            rows = tl.load(
                weights_ptr + features[:, None] * d + columns[None, :], mask=live[:, None] & inside[None, :], other=0.0
            )
            dots = fold(rows.to(tl.float32) * total[None, :], SLOTS, WIDTH)
            tl.store(dots_ptr + tile * n_tokens * k + entries, dots, mask=live)


@triton.jit
def _add_tiles(parts_ptr, out_ptr, size, n_tiles, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n_tiles):
        total += tl.load(parts_ptr + at, mask=at < size, other=0.0)
        parts_ptr += size
    tl.store(out_ptr + at, scale * total, mask=at < size)


def decode_loss(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, ends: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, float32: loss [N], errors [len(ends), N, d], the gradient for ``top_acts`` [N, k].

    Weights, bias and target are read in the dtype that they have.
    """
    (n_tokens, k), d = top_indices.shape, W_dec.shape[1]
    top_acts, b_dec = top_acts.float(), b_dec.float()
    if not n_tokens or not k or not d:  # nothing to launch
        return reference.decode_loss(top_acts, top_indices, W_dec.float(), b_dec, target.float(), ends)
    errors = torch.empty(len(ends), n_tokens, d, device=W_dec.device)
    W_dec, b_dec, target = W_dec.contiguous(), b_dec.contiguous(), target.contiguous()
    whole = len(ends) == 1 and k <= max(_TILES)
    entries = max(min(_TILES), triton.next_power_of_2(k))
    width, warps = _TILES[entries] if whole else (WIDTH, 2)
    n_tiles = triton.cdiv(d, width)
    losses = torch.empty(n_tiles, n_tokens, device=W_dec.device)
    dots = torch.empty(n_tiles, n_tokens, k, device=W_dec.device)
    if whole:
        _whole_rows[n_tokens, n_tiles](
            top_acts.contiguous(), top_indices.contiguous(), W_dec, b_dec, target, errors, losses, dots, n_tokens, k, d,
            ENTRIES=entries, WIDTH=width, num_warps=warps,
        )  # fmt: skip
        return _add(losses, 1.0), errors, _add(dots, 2.0)

    features, order = top_indices.contiguous().sort(dim=1, stable=True)
    before = torch.searchsorted(features, _bounds(ends, W_dec.device).repeat(n_tokens, 1))
    _by_prefix[n_tokens, n_tiles](
        top_acts.gather(1, order), features, before, W_dec, b_dec, target, errors, losses, dots, n_tokens, k, d,
        len(ends), n_tokens * d, ROWS=_ROWS, SLOTS=SLOTS, WIDTH=width, num_warps=warps,
    )  # fmt: skip
    acts_grad = torch.empty(n_tokens, k, device=W_dec.device).scatter_(1, order, _add(dots, 2.0))
    return _add(losses, 1.0), errors, acts_grad


@functools.lru_cache(maxsize=64)
def _bounds(ends: tuple[int, ...], device: torch.device) -> Tensor:
    """(0, *ends) on the device: copied there once, for a copy at every step would wait for the device."""
    return torch.tensor((0, *ends), device=device)


def _add(parts: Tensor, scale: float) -> Tensor:
    """``scale`` times the sum of ``parts`` over its first axis, in order."""
    out = torch.empty(parts.shape[1:], device=parts.device)
    _add_tiles[triton.cdiv(out.numel(), _ADDED),](parts, out, out.numel(), len(parts), scale, BLOCK=_ADDED)
    return out


def variants() -> list[Variant]:
    """Every way in which the kernels may be launched."""
    added = {"parts_ptr": "*fp32", "out_ptr": "*fp32", "size": "i64", "n_tiles": "i32", "scale": "fp32"}
    found = [Variant(_add_tiles, added, {"BLOCK": _ADDED})]
    aligned = ("k", "d", "plane")
    for weights, target, plane, divisible in [
        ("bf16", "bf16", "i32", aligned), ("bf16", "fp32", "i32", aligned), ("fp32", "fp32", "i32", aligned),
        ("fp32", "fp32", "i64", aligned), ("bf16", "bf16", "i32", ()), ("fp32", "fp32", "i64", ()),
    ]:  # fmt: skip
        types = {
            "acts_ptr": "*fp32",
            "features_ptr": "*i64",
            "cuts_ptr": "*i64",
            "weights_ptr": f"*{weights}",
            "bias_ptr": "*fp32",
            "target_ptr": f"*{target}",
            "error_ptr": "*fp32",
            "errors_ptr": "*fp32",
            "loss_ptr": "*fp32",
            "dots_ptr": "*fp32",
            "n_tokens": "i32",
            "k": "i32",
            "d": "i32",
            "n_groups": "i32",
            "plane": plane,
        }
        kernels = [(_by_prefix, {"ROWS": _ROWS, "SLOTS": SLOTS, "WIDTH": WIDTH}, 2)]
        if plane == "i32":  # _whole_rows has no such argument
            kernels += [(_whole_rows, {"ENTRIES": n, "WIDTH": width}, warps) for n, (width, warps) in _TILES.items()]
        found += [
            Variant(
                kernel,
                {name: types[name] for name in kernel.arg_names if name in types},
                constants,
                divisible=tuple(name for name in divisible if name in kernel.arg_names),
                options={"num_warps": warps},
            )
            for kernel, constants, warps in kernels
        ]
    return found
