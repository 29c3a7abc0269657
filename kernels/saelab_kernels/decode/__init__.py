"""Decoding: a weighted sum of k rows of W_dec for each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab_kernels import arguments, compiled, dispatch
from saelab_kernels.decode import cpu, reference
from saelab_kernels.dots import sampled_dot
from saelab_kernels.grads import feature_grad
from saelab_kernels.pairs import pairs_by_feature


def sparse_decode(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """``out[n] = sum_j top_acts[n, j] * W_dec[top_indices[n, j]] + b_dec``, [N, d].

    top_acts [N, k], top_indices int64 [N, k], W_dec [F, d], b_dec [d] or None. Differentiable once in all but the
    indices. Computes in float32 or wider. Deterministic: two runs are bitwise equal.

    Raises:
        TypeError: not floating-point, or ``top_indices`` not int64.
        ValueError: shapes that do not fit, or an index out of range.
    """
    arguments.check_matrix("W_dec", W_dec)
    arguments.check_indices(top_indices, n_features=len(W_dec))
    arguments.check_matrix("top_acts", top_acts, rows=len(top_indices), columns=top_indices.shape[1])
    dtype = arguments.computing_dtype(top_acts, W_dec)
    if b_dec is not None:
        arguments.check_vector("b_dec", b_dec, length=W_dec.shape[1])
        b_dec = b_dec.to(dtype)
    path = dispatch.path_for(W_dec, top_indices.shape[1], dtype=dtype)
    if path == "reference":
        return reference.sparse_decode(top_acts.to(dtype), top_indices, W_dec.to(dtype), b_dec)
    weights = W_dec if path == "fused" else W_dec.to(dtype)
    recon = _SparseDecode.apply(top_acts.to(dtype), top_indices, weights, path)
    return recon if b_dec is None else recon + b_dec


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, path: str) -> Tensor:
        ctx.save_for_backward(top_acts, top_indices, W_dec)
        if path == "fused":
            from saelab_kernels.decode import fused

            return compiled.or_else(
                "sparse_decode",
                lambda: fused.sparse_decode(top_acts, top_indices, W_dec),
                lambda: cpu.sparse_decode(top_acts, top_indices, W_dec.to(top_acts.dtype)),
                strict=dispatch.strict(),
            )
        return cpu.sparse_decode(top_acts, top_indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        top_acts, top_indices, W_dec = ctx.saved_tensors
        need_acts, _, need_weights, _ = ctx.needs_input_grad
        acts_grad = sampled_dot(grad, W_dec, top_indices) if need_acts else None
        weights_grad = feature_grad(pairs_by_feature(top_indices, len(W_dec)), top_acts, grad) if need_weights else None
        return acts_grad, None, weights_grad, None
