"""Log-probabilities of given tokens, without the N x V logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab_kernels import arguments, compiled, dispatch
from saelab_kernels.logps import cpu, reference


def token_logps(hidden: Tensor, W_U: Tensor, targets: Tensor) -> Tensor:
    """``log_softmax(hidden @ W_U.T)[n, targets[n]]`` for each token n, in nats: [N], float32 or wider.

    hidden [N, d], W_U [V, d] (a row for each token of the vocabulary), targets int64 [N]. Differentiable once in hidden
    and W_U. No tensor of N x V entries is made, neither forward nor backward. There is no index to ignore: leave such
    tokens out before. Infinite logits and NaN come out as log_softmax has them.

    Raises:
        TypeError: hidden or W_U not floating-point, targets not int64.
        ValueError: shapes that do not fit, an empty vocabulary, or targets outside 0..V-1. On other devices than the
            CPU, where looking at the targets would stall, such a token gets NaN instead.
    """
    arguments.check_matrix("W_U", W_U)
    arguments.check_matrix("hidden", hidden, columns=W_U.shape[1])
    _check_targets(targets, n_tokens=len(hidden), n_vocabulary=len(W_U))
    path = dispatch.path_for(W_U, 1, gathers=False)
    if path == "reference" and dispatch.strict():
        dtype = arguments.computing_dtype(hidden, W_U)
        return reference.token_logps(hidden.to(dtype), W_U.to(dtype), targets)
    # otherwise a device without fused kernels takes the tiles of torch, which any device has
    dtype = torch.promote_types(hidden.dtype, W_U.dtype)
    fused = path == "fused" and dtype != torch.float64
    return _TokenLogps.apply(hidden.to(dtype), W_U.to(dtype), targets, fused)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, W_U: Tensor, targets: Tensor, fused: bool) -> Tensor:
        hidden, W_U, targets = hidden.contiguous(), W_U.contiguous(), targets.contiguous()
        logps, logsumexp = _forward(hidden, W_U, targets, fused)
        ctx.save_for_backward(hidden, W_U, targets, logsumexp)
        ctx.fused = fused
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        need_hidden, need_W_U, *_ = ctx.needs_input_grad
        hidden, W_U, targets, logsumexp = ctx.saved_tensors
        need = (need_hidden, need_W_U)
        grads = _backward(grad.contiguous(), hidden, W_U, targets, logsumexp, ctx.fused, need)
        return *grads, None, None


def _forward(hidden: Tensor, W_U: Tensor, targets: Tensor, fused: bool) -> cpu.Logps:
    def in_torch() -> cpu.Logps:
        return cpu.token_logps(hidden, W_U, targets)

    if not fused:
        return in_torch()
    from saelab_kernels.logps import fused as kernels

    return compiled.or_else(
        "token_logps", lambda: kernels.token_logps(hidden, W_U, targets), in_torch, strict=dispatch.strict()
    )


def _backward(
    grad: Tensor, hidden: Tensor, W_U: Tensor, targets: Tensor, logsumexp: Tensor, fused: bool, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    def in_torch() -> tuple[Tensor | None, Tensor | None]:
        return cpu.gradients(grad, hidden, W_U, targets, logsumexp, need=need)

    if not fused:
        return in_torch()
    from saelab_kernels.logps import fused as kernels

    return compiled.or_else(
        "token_logps backward",
        lambda: kernels.gradients(grad, hidden, W_U, targets, logsumexp, need=need),
        in_torch,
        strict=dispatch.strict(),
    )


def _check_targets(targets: Tensor, *, n_tokens: int, n_vocabulary: int) -> None:
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if targets.shape != (n_tokens,):
        raise ValueError(f"targets must have shape [{n_tokens}], got {list(targets.shape)}")
    if n_vocabulary == 0:
        raise ValueError("W_U must have at least one row, got none")
    if targets.device.type == "cpu" and len(targets):
        low, high = torch.aminmax(targets)
        if low < 0 or high >= n_vocabulary:
            raise ValueError(
                f"targets must lie in 0..{n_vocabulary - 1}, got {int(low)}..{int(high)}; there is no index to ignore, "
                "so leave such tokens out"
            )
