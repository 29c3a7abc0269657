"""Definition of JumpReLU on dense pre-activations, with the straight-through gradient of its threshold."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def encode_jumprelu(x: Tensor, W: Tensor, b: Tensor, threshold: Tensor) -> Tensor:
    """x [N, d], W [F, d], b and threshold [F] -> activations [N, F]."""
    pre_acts = F.linear(x, W, b)
    return pre_acts.masked_fill(pre_acts <= threshold.clamp_min(0), 0)


def threshold_grad(
    x: Tensor, W: Tensor, b: Tensor, threshold: Tensor, acts_grad: Tensor, step_grad: Tensor, *, bandwidth: float
) -> Tensor:
    """[F] from the gradients [N, F] of activations and steps (arXiv 2407.14435, eq. 11 and 12, rectangle kernel)."""
    near = (F.linear(x, W, b) - threshold).abs() < bandwidth / 2
    return -((threshold * acts_grad + step_grad) / bandwidth * near).sum(0)
