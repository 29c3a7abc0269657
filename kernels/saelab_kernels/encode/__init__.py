"""Encoding: the k largest pre-activations of each token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab_kernels import arguments, compiled, dispatch
from saelab_kernels.decode import sparse_decode
from saelab_kernels.encode import cpu, reference
from saelab_kernels.grads import feature_grad, feature_sum
from saelab_kernels.pairs import pairs_by_feature


class TopK(NamedTuple):
    """The active features of each token, largest first; equal values by ascending index."""

    top_acts: Tensor  # float32 or wider [N, k]
    top_indices: Tensor  # int64 [N, k]


def encode_topk(x: Tensor, W: Tensor, b: Tensor, k: int, *, relu: bool = True) -> TopK:
    """The k largest entries of ``x @ W.T + b`` for each token; with ``relu`` the negative ones among them become 0.

    x [N, d], W [F, d], b [F]. Differentiable once in x, W and b through the activations. Computes in float32 or wider.
    Equal values go to the lower index. A NaN anywhere in a token's row reaches its activations; nothing is hidden.
    Deterministic: two runs are bitwise equal, and on the CPU path a token's result does not depend on its batch.

    Raises:
        TypeError: not floating-point.
        ValueError: shapes that do not fit, or k outside 1..F.
    """
    arguments.check_matrix("W", W)
    arguments.check_matrix("x", x, columns=W.shape[1])
    arguments.check_vector("b", b, length=len(W))
    arguments.check_k(k, len(W))
    dtype = arguments.computing_dtype(x, W, b)
    path = dispatch.path_for(W, k, gathers=False, dtype=dtype)
    if path != "fused":  # which reads 16-bit weights as they are
        x, W, b = x.to(dtype), W.to(dtype), b.to(dtype)
    if path == "reference":
        top_acts, top_indices = reference.encode_topk(x, W, b, k)
        return TopK(top_acts.relu() if relu else top_acts, top_indices)
    return TopK(*_EncodeTopK.apply(x, W, b, k, relu, path))


def largest(x: Tensor, W: Tensor, b: Tensor, k: int, path: str) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations and their indices on the path "cpu" or "fused", without autograd."""
    if path == "cpu":
        return cpu.encode_topk(x, W, b, k)
    from saelab_kernels.encode import fused

    x, W, b = (tensor.contiguous() for tensor in (x, W, b))
    return compiled.or_else(
        "encode_topk",
        lambda: fused.encode_topk(x, W, b, k),
        lambda: reference.encode_topk(x, W, b, k),
        strict=dispatch.strict(),
    )


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, k: int, relu: bool, path: str) -> tuple[Tensor, Tensor]:
        top_acts, top_indices = largest(x, W, b, k, path)
        if relu:
            top_acts = top_acts.relu()
        ctx.save_for_backward(x, W, top_indices, top_acts > 0 if relu else None)
        ctx.mark_non_differentiable(top_indices)
        return top_acts, top_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, W, top_indices, active = ctx.saved_tensors
        if active is not None:
            grad = grad * active
        need_x, need_W, need_b, *_ = ctx.needs_input_grad
        pairs = pairs_by_feature(top_indices, len(W)) if need_W or need_b else None
        x_grad = sparse_decode(grad, top_indices, W) if need_x else None
        W_grad = feature_grad(pairs, grad, x) if pairs and need_W else None
        b_grad = feature_sum(pairs, grad) if pairs and need_b else None
        return x_grad, W_grad, b_grad, None, None, None
