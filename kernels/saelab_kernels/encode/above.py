"""Every pre-activation above its feature's floor, decided by float32 dot products in a fixed order.

Candidates come from a product in 16 bits, with some slack below the floor (encode.surplus). What was left out is proven
by the errors of what was not: twice the largest error among the candidates must stay below the slack with which they
were found, else the search is done again with a slack that always suffices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saelab_kernels.dots.fused import ragged_dot
from saelab_kernels.encode import stream, surplus
from saelab_kernels.ragged import Ragged

SAFETY = 2.0


def encode_above(x: Tensor, W: Tensor, b: Tensor, floor: Tensor, *, cap: int = 1024) -> Ragged:
    """x [N, d], W [F, d], b [F], floor [F] -> the pre-activations above their feature's floor; NaN counts as above.

    ``cap`` is for how many of a token there is room at first. Waits for the device several times: how large the result
    is depends on the data.
    """
    x, W, b, floor = x.detach(), W.detach(), b.detach().float(), floor.detach().float()
    W_low = W.to(stream.search_dtype(W))
    w_norm = _norms(W)
    parts = [_block_above(part, W, b, floor, W_low, w_norm, cap) for part in x.split(stream.ROWS)]
    starts = torch.tensor([0, *(len(part.acts) for part in parts)]).cumsum(0).tolist()
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    end = torch.tensor([starts[-1]], device=x.device)
    return Ragged(
        torch.cat([p.acts for p in parts]), torch.cat([p.features for p in parts]), torch.cat([*offsets, end])
    )


def _block_above(x: Tensor, W: Tensor, b: Tensor, floor: Tensor, W_low: Tensor, w_norm: Tensor, cap: int) -> Ragged:
    x_low, norms = x.to(W_low.dtype), (_norms(x), w_norm)
    expected, certain = _spread(x, W, W_low)
    for spread in (expected, certain):
        found = surplus.emit_above(x_low, W_low, b, floor, norms=norms, spread=spread, cap=cap)
        dots = ragged_dot(x, W, found.offsets, found.features)
        exact = dots + b[found.features]
        if spread == certain or bool(_within(found, dots, exact, norms, spread / SAFETY, x_low.dtype)):
            break
    kept = ~(exact <= floor[found.features])
    before = torch.zeros(len(kept) + 1, dtype=torch.int64, device=x.device)
    before[1:] = kept.cumsum(0)
    return Ragged(exact[kept], found.features[kept], before[found.offsets])


def _spread(x: Tensor, W: Tensor, W_low: Tensor) -> tuple[float, float]:
    """Error of a product relative to |x| |W[f]|: eight times what roundings of random sign add up to, and the most."""
    d = x.shape[1]
    rounding = 0.0 if x.dtype == W.dtype == W_low.dtype else torch.finfo(W_low.dtype).eps / 2
    summing = 4 * 2.0**-24 * d**0.5
    return 8 * rounding / d**0.5 + summing, 2.02 * rounding + max(summing, 2.0**-23 * d)


def _norms(rows: Tensor) -> Tensor:
    """Length of each row; summed in float64, where no square of a float32 overflows or vanishes."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).float()


def _within(
    found: Ragged, dots: Tensor, exact: Tensor, norms: tuple[Tensor, Tensor], spread: float, dtype: torch.dtype
) -> Tensor:
    """Whether no finite candidate's error, beyond the rounding of the product itself, exceeds ``spread`` |x| |W[f]|."""
    rounding = torch.finfo(dtype).eps / 2 * 1.01 if dtype != torch.float32 else 0.0
    error = (exact - found.acts).abs() - rounding * dots.abs() - 2.0**-22 * exact.abs()
    return ~(error > spread * norms[0][found.tokens] * norms[1][found.features]).any()
