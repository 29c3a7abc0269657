"""AuxK: the loss by which dead features learn what the living ones leave over, and its gradient in their rows alone.

Not called aux, which is no name for a folder on Windows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab_kernels import arguments, dispatch
from saelab_kernels.revive import packed, reference


class AuxDead(NamedTuple):
    """The loss and its gradient. Every other row of a gradient is 0."""

    loss: Tensor  # scalar
    rows: Tensor  # int64 [n_dead], the features
    W_enc_grad: Tensor  # [n_dead, d]
    b_enc_grad: Tensor  # [n_dead]
    W_dec_grad: Tensor  # [n_dead, d]


def aux_dead(
    rows: Tensor, residual: Tensor, centred: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k_aux: int
) -> AuxDead:
    """Share of the variance of ``residual`` that the k_aux largest dead features of each token do not explain.

        loss = sum |residual - recon|^2 / sum |residual - mean(residual)|^2        (Gao et al. 2024, 2406.04093, A.2)

    rows int64 [n_dead], each feature once; residual and centred (the encoder's input) [N, d]; W_enc and W_dec [F, d];
    b_enc [F]. 0 without dead features. Computes in float32 or wider, without autograd. Equal pre-activations at the
    border go to the lower place in ``rows``; NaN is not hidden.

    Raises:
        TypeError: not floating-point, or rows not int64.
        ValueError: shapes that do not fit, rows outside 0..F-1 (looked at on the CPU only), or k_aux below 1.
    """
    _check(rows, residual, centred, W_enc, b_enc, W_dec, k_aux)
    dtype = arguments.computing_dtype(residual, centred, W_enc, b_enc, W_dec)
    residual, centred = residual.to(dtype), centred.to(dtype)
    if _by_definition():
        W_enc, b_enc, W_dec = W_enc.to(dtype), b_enc.to(dtype), W_dec.to(dtype)
        loss, *grads = reference.aux_dead(rows, residual, centred, W_enc, b_enc, W_dec, k_aux)
        return AuxDead(loss, rows, *grads)
    with torch.no_grad():
        dead = _packed(rows, W_enc, b_enc, W_dec, dtype)
        revival = packed.revive(dead, residual, centred, k_aux)
        return AuxDead(revival.loss, rows, *packed.gradients(dead, revival, centred))


def aux_loss(
    rows: Tensor, residual: Tensor, centred: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k_aux: int
) -> Tensor:
    """The loss of ``aux_dead``, differentiable once in W_enc, b_enc and W_dec with gradients of their full sizes.

    ``residual`` and ``centred`` count as constants.

    Raises:
        TypeError, ValueError: as ``aux_dead``.
    """
    _check(rows, residual, centred, W_enc, b_enc, W_dec, k_aux)
    dtype = arguments.computing_dtype(residual, centred, W_enc, b_enc, W_dec)
    residual, centred = residual.detach().to(dtype), centred.detach().to(dtype)
    if _by_definition():
        return reference.aux_loss(rows, residual, centred, W_enc.to(dtype), b_enc.to(dtype), W_dec.to(dtype), k_aux)
    return _AuxLoss.apply(rows, residual, centred, W_enc, b_enc, W_dec, k_aux)


class _AuxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        residual: Tensor,
        centred: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        k_aux: int,
    ) -> Tensor:
        dead = _packed(rows, W_enc, b_enc, W_dec, residual.dtype)
        revival = packed.revive(dead, residual, centred, k_aux)
        ctx.save_for_backward(rows, centred, *dead, *revival)
        ctx.full = [(tensor.shape, tensor.dtype) for tensor in (W_enc, b_enc, W_dec)]
        return revival.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, centred, *saved = ctx.saved_tensors
        dead, revival = packed.Dictionary(*saved[:3]), packed.Revival(*saved[3:])
        grads = packed.gradients(dead, revival, centred)
        whole = [
            torch.zeros(shape, dtype=dtype, device=part.device).index_copy_(0, rows, part.mul_(grad).to(dtype))
            for part, (shape, dtype) in zip(grads, ctx.full, strict=True)
        ]
        return None, None, None, *whole, None


def _packed(rows: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, dtype: torch.dtype) -> packed.Dictionary:
    return packed.Dictionary(*(tensor.index_select(0, rows).to(dtype) for tensor in (W_enc, b_enc, W_dec)))


def _by_definition() -> bool:
    """Whether the definition was asked for by name: the packed form is for every device and never slower."""
    return dispatch.strict() and dispatch.choose(torch.device("cpu"), n_features=1, k=1).name == "reference"


def _check(
    rows: Tensor, residual: Tensor, centred: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k_aux: int
) -> None:
    arguments.check_matrix("W_enc", W_enc)
    arguments.check_matrix("W_dec", W_dec, rows=W_enc.shape[0], columns=W_enc.shape[1])
    arguments.check_vector("b_enc", b_enc, length=len(W_enc))
    arguments.check_matrix("centred", centred, columns=W_enc.shape[1])
    arguments.check_matrix("residual", residual, rows=len(centred), columns=W_enc.shape[1])
    if k_aux < 1:
        raise ValueError(f"k_aux must be at least 1, got {k_aux}")
    if rows.dtype != torch.int64:
        raise TypeError(f"rows must be int64, got {rows.dtype}")
    if rows.ndim != 1:
        raise ValueError(f"rows must have shape [n_dead], got {list(rows.shape)}")
    if rows.device.type == "cpu" and len(rows):
        low, high = torch.aminmax(rows)
        if low < 0 or high >= len(W_enc):
            raise ValueError(f"rows must lie in 0..{len(W_enc) - 1}, got {int(low)}..{int(high)}")
