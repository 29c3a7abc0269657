"""JumpReLU encoding: a pre-activation passes whole if it exceeds its feature's threshold."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab_kernels import arguments
from saelab_kernels.above import encode_above
from saelab_kernels.ragged import Ragged


class JumpReLU(NamedTuple):
    """The pairs that a JumpReLU layer computes with."""

    active: Ragged
    """Activations; 0 for the pairs that are only near the threshold, which are there for its gradient."""
    pre_acts: Tensor  # [P]
    step: Tensor  # [P], 1 where the pair is active: the terms of an L0 penalty


def encode_jumprelu(x: Tensor, W: Tensor, b: Tensor, threshold: Tensor, *, bandwidth: float = 0.0) -> JumpReLU:
    """``z * (z > threshold)`` for ``z = x @ W.T + b``, as the pairs that it is made of; a threshold is never negative.

    x [N, d], W [F, d], b and threshold [F]. Differentiable once in x, W and b through the activations. With a
    ``bandwidth`` eps above 0 it is also differentiable in the threshold, through activations and ``step``, by the
    straight-through estimators of Rajamanoharan et al. 2024 (arXiv 2407.14435, eq. 11 and 12) with the rectangle as
    kernel: where |z - threshold| < eps/2, d act / d threshold = -threshold / eps and d step / d threshold = -1 / eps.
    For that the pairs with z > threshold - eps/2 are all there.

    Raises:
        TypeError: not floating-point.
        ValueError: shapes that do not fit, or a negative bandwidth.
    """
    arguments.check_vector("threshold", threshold, length=len(W))
    if not bandwidth >= 0:
        raise ValueError(f"bandwidth must not be negative, got {bandwidth}")
    floor = threshold.detach().clamp_min(0)
    found = encode_above(x, W, b, floor - bandwidth / 2 if bandwidth else floor)
    at_pairs = threshold.clamp_min(0).to(found.acts.dtype)[found.features]
    acts, step = _Jump.apply(found.acts, at_pairs, bandwidth)
    return JumpReLU(found._replace(acts=acts), found.acts, step)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        off = pre_acts <= threshold  # NaN is on, so that it does not vanish
        ctx.save_for_backward(pre_acts, threshold, off)
        ctx.bandwidth = bandwidth
        return pre_acts.masked_fill(off, 0), (~off).to(pre_acts.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, acts_grad: Tensor, step_grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        pre_acts, threshold, off = ctx.saved_tensors
        threshold_grad = None
        if ctx.bandwidth:
            near = (pre_acts - threshold).abs() < ctx.bandwidth / 2
            threshold_grad = -(threshold * acts_grad + step_grad) / ctx.bandwidth * near
        return acts_grad.masked_fill(off, 0), threshold_grad, None
