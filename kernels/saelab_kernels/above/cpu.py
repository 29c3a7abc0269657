"""Every pre-activation above a floor, at the price of a bfloat16 matrix product.

    1. approx = x @ W.T + (b - floor) in bfloat16 (float32 where the CPU is no faster in bfloat16), some rows at a time:
       what is sought is now above 0, where bfloat16 resolves best.
    2. slack = |x| times six times the largest error of approx near 0, in units of |x|, among a sample of pairs.
    3. candidates = the pairs with approx >= -slack: one comparison of integers, one flatnonzero.
    4. exact = float32 dot products in place (saelab_kernels.dots); the pairs above the floor are the result.

A pair outside the candidates could only belong to the result if its error exceeded the slack. Where twice the largest
error seen among the candidates near 0 does not stay below the slack, they are sought again with a wider one, and if
that keeps failing with every pair; tokens that are not finite are done with every pair at once. As in ``encode.cpu``, a
token's result is that of float32 dot products in a fixed order and depends neither on its batch nor on the precision of
step 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saelab_kernels import arguments, dispatch
from saelab_kernels.above import reference
from saelab_kernels.dots.cpu import ragged_dot
from saelab_kernels.ragged import Ragged

#: The slack must exceed this multiple of the largest error among the candidates near the floor.
SAFETY = 2.0

#: One block of approx, and how many of them are rescored together.
_BLOCK_BYTES = 2**24
_BLOCKS = 8
_CHUNK_BYTES = 2**22
_MAX_PAIRS = 2**22
_SAMPLE, _SAMPLED_TOKENS = 4096, 16
#: Near the floor is below this share of |x|, where bfloat16 rounds the result by less than the inputs were rounded by.
_NEAR = 1 / 64
_ATTEMPTS, _WIDENING = 3, 6


class _Layer(NamedTuple):
    W: Tensor
    b: Tensor
    floor: Tensor
    W_low: Tensor
    shifted: Tensor  # b - floor in the precision of W_low, rounded up so that it lets no pair go
    rounding: Tensor  # what that adds


class _Found(NamedTuple):
    tokens: np.ndarray
    features: Tensor
    exact: Tensor


def encode_above(x: Tensor, W: Tensor, b: Tensor, floor: Tensor) -> Ragged:
    """x [N, d], W [F, d], b [F], floor [F] -> the pre-activations above their feature's floor; NaN counts as above."""
    if x.dtype != torch.float32:  # float64 is for checks
        return reference.encode_above(x, W, b, floor)
    gemm = getattr(torch, dispatch.candidate_gemm().name)
    shift = (b - floor).clamp(-1e30, 1e30)
    shifted = _rounded_up(shift, gemm)
    layer = _Layer(W, b, floor, W.to(gemm), shifted, shifted.float() - shift)
    searchable = arguments.all_finite(W) and arguments.all_finite(b) and not floor.isnan().any()
    rows = max(1, _BLOCK_BYTES // (layer.W_low.element_size() * len(W)))
    found, unit = [], 0.0
    for start in range(0, len(x), _BLOCKS * rows):
        tokens = x[start : start + _BLOCKS * rows]
        if searchable and arguments.all_finite(tokens):
            part, unit = _proven(tokens, layer, unit, rows)
        else:
            part = _exhaustive(tokens, layer)
        found.append(part._replace(tokens=part.tokens + start))
    if not found:
        return Ragged(x.new_zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    offsets = np.searchsorted(np.concatenate([part.tokens for part in found]), np.arange(len(x) + 1))
    features = torch.cat([part.features for part in found])
    return Ragged(torch.cat([part.exact for part in found]), features, torch.from_numpy(offsets))


def _proven(x: Tensor, layer: _Layer, unit: float, rows: int) -> tuple[_Found, float]:
    """The pairs of some tokens, and the slack in units of |x| to begin the next ones with."""
    unit = unit or _sampled_unit(x[:: max(1, len(x) // _SAMPLED_TOKENS)], layer)
    for _ in range(_ATTEMPTS):
        found, error = _search(x, layer, unit, rows)
        if SAFETY * error < unit:
            return found, unit
        unit = _WIDENING * error
    return _exhaustive(x, layer), unit


def _search(x: Tensor, layer: _Layer, unit: float, rows: int) -> tuple[_Found, float]:
    """Steps 1, 3 and 4, and the largest error in units of |x| among the candidates near the floor."""
    lengths = _lengths(x)
    positions, approximate = [], []
    for start in range(0, len(x), rows):
        approx = _approx(x[start : start + rows], layer)
        flat = _at_least(approx, -unit * lengths[start : start + rows])
        positions.append(flat + start * len(layer.W))
        approximate.append(approx.view(-1)[torch.from_numpy(flat)])
    values = torch.cat(approximate).float().numpy()
    # all blocks at once: the weights, which outgrow the cache, pass by once for all of their tokens
    tokens, features, exact = _exact(x, layer, np.concatenate(positions))
    height = exact.numpy() - layer.floor.numpy()[features]
    length = lengths.numpy()[tokens]
    near = np.flatnonzero(values <= max(unit, _NEAR) * length)
    error = np.abs(values[near] - layer.rounding.numpy()[features[near]] - height[near]) / length[near]
    kept = np.flatnonzero(height > 0)
    found = _Found(tokens[kept], torch.from_numpy(features[kept]), exact[torch.from_numpy(kept)])
    return found, float(error.max(initial=0.0))


def _approx(x: Tensor, layer: _Layer) -> Tensor:
    return F.linear(x.to(layer.W_low.dtype), layer.W_low, layer.shifted)


def _lengths(x: Tensor) -> Tensor:
    """|x| of each token, which errors are proportional to; above 0."""
    return torch.linalg.vector_norm(x, dim=1).clamp_min_(1e-30)


def _at_least(approx: Tensor, low: Tensor) -> np.ndarray:
    """Ascending flat positions of the entries of ``approx`` [N, F] that reach their token's negative ``low`` [N].

    As unsigned integers the bits of floats run 0, ..., +inf, -0, ..., -inf, so one comparison decides.
    """
    unsigned = np.uint16 if approx.dtype == torch.bfloat16 else np.uint32
    signed = torch.int16 if approx.dtype == torch.bfloat16 else torch.int32
    # rounded up a bound would let pairs go: one step down is one step up among the bits of a negative float
    rounded = low.to(approx.dtype)
    border = rounded.view(signed).numpy().view(unsigned) + (rounded.float() > low).numpy().astype(unsigned)
    bits = approx.view(signed).numpy().view(unsigned)
    rows = max(1, _CHUNK_BYTES // bits[0].nbytes)
    found = [
        np.flatnonzero(bits[at : at + rows] <= border[at : at + rows, None]) + at * bits.shape[1]
        for at in range(0, len(bits), rows)
    ]
    return np.concatenate(found)


def _sampled_unit(x: Tensor, layer: _Layer) -> float:
    """Six times the largest error near 0, in units of |x|, among pairs spread over the features of a few tokens."""
    approx = _approx(x, layer)
    flat = np.linspace(0, approx.numel() - 1, min(_SAMPLE, approx.numel()), dtype=np.int64)
    tokens, features, exact = _exact(x, layer, flat)
    index = torch.from_numpy(features)
    values = approx.view(-1)[torch.from_numpy(flat)].float()
    # the output's own rounding grows with its distance from 0 and says nothing about the pairs at the border
    output = values.abs() * torch.finfo(approx.dtype).eps / 2
    error = (values - layer.rounding[index] - (exact - layer.floor[index])).abs() - output
    length = _lengths(x)[torch.from_numpy(tokens)]
    least = torch.finfo(torch.float32).eps * float((values.abs() / length).max())
    return _WIDENING * max(float((error / length).max()), least)


def _rounded_up(values: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = values.to(dtype)
    return torch.where(rounded.float() < values, torch.nextafter(rounded, rounded.new_tensor(torch.inf)), rounded)


def _exact(x: Tensor, layer: _Layer, flat: np.ndarray) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Token, feature and float32 pre-activation of each of the ascending positions ``flat`` in [N, F]."""
    n_features = len(layer.W)
    starts = np.searchsorted(flat, np.arange(len(x) + 1) * n_features)
    tokens = np.repeat(np.arange(len(x)), np.diff(starts))
    features = flat - tokens * n_features
    index = torch.from_numpy(features)
    return tokens, features, ragged_dot(x, layer.W, torch.from_numpy(starts), index) + layer.b[index]


def _exhaustive(x: Tensor, layer: _Layer) -> _Found:
    """Every pair rescored."""
    n_features, parts = len(layer.W), []
    rows = max(1, _MAX_PAIRS // n_features)
    for start in range(0, len(x), rows):
        block = x[start : start + rows]
        tokens, features, exact = _exact(block, layer, np.arange(len(block) * n_features))
        kept = ~(exact <= layer.floor[torch.from_numpy(features)])
        parts.append(_Found(tokens[kept.numpy()] + start, torch.from_numpy(features)[kept], exact[kept]))
    return _Found(
        np.concatenate([part.tokens for part in parts]),
        torch.cat([part.features for part in parts]),
        torch.cat([part.exact for part in parts]),
    )
