"""Exact top-k encoding on the CPU at the price of a bfloat16 matrix product.

    1. approx = x @ W.T + b in bfloat16 (float32 where the CPU is no faster in bfloat16).
    2. floor = the (k + margin)-th largest of the maxima of G groups of features. At least k + margin features reach it,
       because k + margin groups have a member that does; with G = 4 (k + margin) or more, hardly any others do.
    3. candidates = the features that reach the floor: one comparison and one flatnonzero for the whole block.
    4. exact = their pre-activations as float32 dot products in place (saelab_kernels.dots).
    5. The k largest by (exact descending, index ascending), by one sort of 64-bit integers that hold both.

A feature outside the candidates has approx < floor, so it could only belong to the k if its error exceeded
(k-th exact - floor). Rows where that gap is not above twice the largest error seen among their own candidates are done
again with more candidates, then with those of a float32 product, and if that is no proof either (many equal values,
NaN) with every feature. So the result is that of float32 dot products in fixed order, whatever the precision of step 1.

Floats are compared as integers of the same size (step 2, 3, 5): numpy's integer sort, partition and comparison use the
CPU's vector instructions. ``_sortable`` maps float bits to integers of the same order and is its own inverse.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab_kernels import arguments, dispatch
from saelab_kernels.dots.cpu import ragged_dot, sampled_dot
from saelab_kernels.encode import reference

#: A row's gap must exceed this multiple of the largest error among its ~1.7 k candidates (misses: kernels/README.md).
SAFETY = 2.0

_BLOCK_BYTES = 2**25
_CHUNK_BYTES = 2**21
_LARGEST_GROUP = 16
#: Margins of a second search among the same approximate values, which costs next to nothing for a few rows.
_WIDER = 4
_MAX_PAIRS = 2**22


class _Selected(NamedTuple):
    top_acts: Tensor  # [N, k]
    top_indices: Tensor  # [N, k]
    proven: Tensor  # bool [N]: the k largest are among the candidates


def margin(k: int) -> int:
    """How many candidates beyond k: 16 for k=32. Chosen so that about one row in a thousand needs a second pass."""
    return max(8, k // 2)


def encode_topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [N, d], W [F, d], b [F] -> the k largest pre-activations [N, k], before any ReLU, and their indices [N, k]."""
    if x.dtype != torch.float32:  # float64 is for checks: nothing to gain from candidates
        return reference.encode_topk(x, W, b, k)
    top_acts, top_indices = x.new_empty(len(x), k), torch.empty(len(x), k, dtype=torch.int64)
    n_blocks = -(-2 * len(W) * len(x) // _BLOCK_BYTES)
    rows_per_block = max(1, -(-len(x) // max(1, n_blocks)))
    gemm = getattr(torch, dispatch.candidate_gemm().name)
    searchable = len(W) >= k + margin(k) and arguments.all_finite(W) and arguments.all_finite(b)
    W_low, b_low = (W.to(gemm), b.to(gemm)) if searchable else (W, b)
    for start in range(0, len(x), rows_per_block):
        block = slice(start, start + rows_per_block)
        left = torch.arange(start, min(start + rows_per_block, len(x)))
        if searchable:
            found = _search(x[block], W, b, k, W_low, b_low)
            top_acts[block], top_indices[block] = found.top_acts, found.top_indices
            left = left[~found.proven]
        for rows in left.split(max(1, _MAX_PAIRS // len(W))) if len(left) else ():
            top_acts[rows], top_indices[rows] = _exhaustive(x[rows], W, b, k)
    return top_acts, top_indices


def _search(x: Tensor, W: Tensor, b: Tensor, k: int, W_low: Tensor, b_low: Tensor) -> _Selected:
    """Steps 1 to 5 for a block of tokens, and again for the rows that were not proven: with more candidates, then with
    those of a float32 product."""
    approx = F.linear(x.to(W_low.dtype), W_low, b_low)
    found = _select(x, W, b, k, approx, k + margin(k))
    for precise in (False, True):
        left = (~found.proven).nonzero().flatten()
        if not len(left) or (precise and approx.dtype == torch.float32):
            break
        again = F.linear(x[left], W, b) if precise else approx[left]
        n_wanted = k + margin(k) if precise else min(k + _WIDER * margin(k), len(W))
        for part, better in zip(found, _select(x[left], W, b, k, again, n_wanted), strict=True):
            part[left] = better
    return found


def _select(x: Tensor, W: Tensor, b: Tensor, k: int, approx: Tensor, n_wanted: int) -> _Selected:
    """Steps 2 to 5 with ``n_wanted`` candidates or more, by their ``approx`` [N, F]."""
    n_tokens, n_features = len(x), len(W)
    flat, floor = _candidates(_bits(approx), n_wanted)
    starts = np.searchsorted(flat, np.arange(n_tokens + 1) * n_features)
    crowded = np.diff(starts) > 4 * n_wanted
    if crowded.any():  # many equal values, or NaN: such rows would make the table below as wide as the dictionary
        flat = flat[~np.repeat(crowded, np.diff(starts))]
        starts = np.searchsorted(flat, np.arange(n_tokens + 1) * n_features)

    rows = np.repeat(np.arange(n_tokens), np.diff(starts))
    features = flat - rows * n_features
    candidates = torch.from_numpy(features)
    exact = ragged_dot(x, W, torch.from_numpy(starts), candidates) + b[candidates]
    error = (exact - approx.view(-1)[torch.from_numpy(flat)].float()).abs()

    width = max(k, int(np.diff(starts).max(initial=0)))
    places = rows * width + np.arange(len(flat)) - starts[rows]
    errors = np.zeros((n_tokens, width), dtype=np.float32)
    errors.ravel()[places] = error.numpy()
    keys = np.full((n_tokens, width), np.iinfo(np.int64).max)
    keys.ravel()[places] = (~_sortable(_bits(exact)).astype(np.int64) << 32) | features
    keys.sort(axis=1)
    top = keys[:, :k]
    top_acts = torch.from_numpy(_sortable((~(top >> 32)).astype(np.int32)).view(np.float32))
    gap = top_acts[:, -1] - torch.from_numpy(_sortable(floor)).view(approx.dtype).float()
    proven = (gap > SAFETY * torch.from_numpy(errors).amax(1)) & torch.from_numpy(~crowded)  # False for NaN
    return _Selected(top_acts, torch.from_numpy(top & 0xFFFFFFFF), proven)


def _candidates(bits: np.ndarray, n_wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions of the candidates among ``bits`` [N, F], and each row's floor [N] as a sortable integer."""
    n_features = bits.shape[1]
    rows = max(1, _CHUNK_BYTES // (n_features * bits.itemsize))  # what these passes share stays in the cache
    positions, floors = [], []
    for start in range(0, len(bits), rows):
        codes = bits[start : start + rows]
        floor = _floor(codes, n_wanted)
        if (floor <= 0).any():  # positive floats are in order as they are, and a floor above 0 is found among them
            codes = _sortable(codes)
            floor = _floor(codes, n_wanted)
        floors.append(floor)
        positions.append(np.flatnonzero(codes >= floor[:, None]) + start * n_features)
    return np.concatenate(positions), np.concatenate(floors)


def _floor(codes: np.ndarray, n_wanted: int) -> np.ndarray:
    """For each row of ``codes`` [N, F] a value [N] that at least ``n_wanted`` of its entries reach."""
    n_tokens, n_features = codes.shape
    size = min(_LARGEST_GROUP, max(1, n_features // (4 * n_wanted)))
    n_groups = n_features // size
    # group g is every n_groups-th feature; the few features left over belong to no group, which keeps the bound true
    maxima = codes[:, : n_groups * size].reshape(n_tokens, size, n_groups).max(1)
    return np.partition(maxima, n_groups - n_wanted, axis=1)[:, n_groups - n_wanted]


def _exhaustive(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Every feature rescored: for rows with ties at the border or NaN, and for dictionaries hardly larger than k."""
    every = torch.arange(len(W)).expand(len(x), -1).contiguous()
    pre_acts = sampled_dot(x, W, every) + b
    top_indices = reference.largest(pre_acts, k)
    return pre_acts.gather(1, top_indices), top_indices


def _bits(floats: Tensor) -> np.ndarray:
    """The bits of bfloat16 as int16, of float32 as int32."""
    return floats.view(torch.int16 if floats.dtype == torch.bfloat16 else torch.int32).numpy()


def _sortable(bits: np.ndarray) -> np.ndarray:
    """Flip all but the sign bit of negative floats: integers then sort as the floats do. Twice is undone."""
    codes = bits >> (8 * bits.itemsize - 1)  # 0, or -1 for negative floats
    codes &= np.iinfo(bits.dtype).max
    codes ^= bits
    return codes
