"""Decoding a ragged batch: a weighted sum of as many rows of W_dec as the token has active features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab_kernels import arguments, compiled, dispatch
from saelab_kernels.bags import weighted_bags
from saelab_kernels.decode import reference
from saelab_kernels.dots.ragged import ragged_dot
from saelab_kernels.grads import feature_grad
from saelab_kernels.pairs import ragged_pairs
from saelab_kernels.ragged import Ragged


def ragged_decode(active: Ragged, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """``out[n] = sum over the pairs p of token n of acts[p] * W_dec[features[p]] + b_dec``, [N, d].

    W_dec [F, d], b_dec [d] or None. Differentiable once in all but the indices. Computes in float32 or wider.
    Deterministic: two runs are bitwise equal.

    Raises:
        TypeError: not floating-point, or features that are not int64.
        ValueError: shapes that do not fit, or a feature out of range.
    """
    arguments.check_matrix("W_dec", W_dec)
    arguments.check_indices(active.features[:, None], n_features=len(W_dec))
    dtype = arguments.computing_dtype(active.acts, W_dec)
    acts, W_dec = active.acts.to(dtype), W_dec.to(dtype)
    path = dispatch.path_for(W_dec, _mean_k(active), dtype=dtype)
    if path == "reference":
        recon = reference.ragged_decode(active._replace(acts=acts), W_dec)
    else:
        recon = _RaggedDecode.apply(acts, active.features, active.offsets, W_dec, path)
    return recon if b_dec is None else recon + b_dec.to(dtype)


class _RaggedDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, features: Tensor, offsets: Tensor, W_dec: Tensor, path: str) -> Tensor:
        ctx.save_for_backward(acts, features, offsets, W_dec)
        if path == "cpu":
            return weighted_bags(features, offsets, acts, W_dec)
        from saelab_kernels.decode import fused

        return compiled.or_else(
            "ragged_decode",
            lambda: fused.ragged_decode(offsets, features, acts, W_dec),
            lambda: weighted_bags(features, offsets, acts, W_dec),
            strict=dispatch.strict(),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        acts, features, offsets, W_dec = ctx.saved_tensors
        need_acts, _, _, need_weights, _ = ctx.needs_input_grad
        active = Ragged(acts, features, offsets)
        acts_grad = ragged_dot(grad, W_dec, active) if need_acts else None
        weights_grad = feature_grad(ragged_pairs(active, len(W_dec)), acts, grad) if need_weights else None
        return acts_grad, None, None, weights_grad, None


def _mean_k(active: Ragged) -> int:
    return -(-len(active.features) // max(len(active.offsets) - 1, 1))
