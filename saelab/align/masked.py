"""Means and whitening over the tokens that count. What stands elsewhere has no influence, whatever it is."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Mean of ``values`` where ``mask`` is True; 0 where it is nowhere."""
    return values.where(mask, 0.0).sum() / mask.sum().clamp_min(1)


def masked_var(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Variance with Bessel's correction where ``mask`` is True; 0 for fewer than two values."""
    deviation = (values - masked_mean(values, mask)).where(mask, 0.0)
    return deviation.square().sum() / (mask.sum() - 1).clamp_min(1)


def whiten(
    values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, shift_mean: bool = True
) -> Float[Tensor, "*shape"]:
    """``values`` scaled to variance 1 over the mask, and to mean 0 unless ``shift_mean`` is off; 0 outside the mask."""
    mean = masked_mean(values, mask)
    scaled = (values - mean) * torch.rsqrt(masked_var(values, mask) + 1e-8)
    return (scaled if shift_mean else scaled + mean).where(mask, 0.0)
