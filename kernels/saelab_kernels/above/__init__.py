"""Encoding by a floor: every pre-activation above its feature's floor, however many there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab_kernels import arguments, compiled, dispatch
from saelab_kernels.above import cpu, reference
from saelab_kernels.decode.ragged import ragged_decode
from saelab_kernels.grads import feature_grad, feature_sum
from saelab_kernels.pairs import ragged_pairs
from saelab_kernels.ragged import Ragged


def encode_above(x: Tensor, W: Tensor, b: Tensor, floor: Tensor) -> Ragged:
    """The entries of ``x @ W.T + b`` above ``floor``, by token and then by feature.

    x [N, d], W [F, d], b [F], floor [F]; the comparison is strict, and NaN counts as above. Differentiable once in x, W
    and b through the activations. Computes in float32 or wider. Deterministic; on the CPU path a token's result does
    not depend on its batch.

    Raises:
        TypeError: not floating-point.
        ValueError: shapes that do not fit.
    """
    arguments.check_matrix("W", W)
    arguments.check_matrix("x", x, columns=W.shape[1])
    arguments.check_vector("b", b, length=len(W))
    arguments.check_vector("floor", floor, length=len(W))
    dtype = arguments.computing_dtype(x, W, b, floor)
    # how many features are active is not known before; what is read is a matrix product of all of them
    path = dispatch.path_for(W, 1, gathers=False, dtype=dtype)
    if path != "fused":  # which reads 16-bit weights as they are
        x, W, b, floor = (tensor.to(dtype) for tensor in (x, W, b, floor))
    if path == "reference":  # which torch differentiates
        return reference.encode_above(x, W, b, floor)
    with torch.no_grad():
        found = _search(path, x, W, b, floor)
    return found._replace(acts=_AtPairs.apply(x, W, b, *found))


def _search(path: str, x: Tensor, W: Tensor, b: Tensor, floor: Tensor) -> Ragged:
    if path == "cpu":
        return cpu.encode_above(x, W, b, floor)
    from saelab_kernels.encode import fused

    x, W, b, floor = (tensor.contiguous() for tensor in (x, W, b, floor))
    return compiled.or_else(
        "emit_above",
        lambda: fused.encode_above(x, W, b, floor),
        lambda: reference.encode_above(x, W, b, floor),
        strict=dispatch.strict(),
    )


class _AtPairs(torch.autograd.Function):
    """The pre-activations of given pairs, whose values are known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, values: Tensor, features: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, features, offsets)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, features, offsets = ctx.saved_tensors
        need_x, need_W, need_b, *_ = ctx.needs_input_grad
        at = Ragged(grad, features, offsets)
        pairs = ragged_pairs(at, len(W)) if need_W or need_b else None
        return (
            ragged_decode(at, W) if need_x else None,
            feature_grad(pairs, grad, x) if pairs and need_W else None,
            feature_sum(pairs, grad) if pairs and need_b else None,
            None,
            None,
            None,
        )
