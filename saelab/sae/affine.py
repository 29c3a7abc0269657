"""Pre-activations of a training batch, all of them or those above a floor, whichever is cheaper.

A product of all tokens with all features costs the same however few are active; what follows it does not. Over pairs
(token, active feature) a step costs half of a dense one as long as few features are active, and more than it otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Below this share of active features pairs are cheaper: even at F / 16, half at F / 100 (2048 x 576, F = 4608).
FEW = 1 / 24

_SAMPLE = 64


class PreActs(torch.autograd.Function):
    """``(acts - b_dec) @ encoder.T + b_enc``, [batch, d_sae], for ``acts`` that need no gradient.

    Without their gradient that of b_dec is a product with one vector, -(sum of the rows) @ encoder, instead of a sixth
    of the whole step.
    """

    @staticmethod
    def forward(
        ctx: Any,
        acts: Float[Tensor, "batch d_in"],
        encoder: Float[Tensor, "d_sae d_in"],
        b_enc: Float[Tensor, " d_sae"],
        b_dec: Float[Tensor, " d_in"],
    ) -> Float[Tensor, "batch d_sae"]:
        centred = acts - b_dec
        ctx.save_for_backward(centred, encoder)
        return torch.addmm(b_enc, centred, encoder.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "batch d_sae"]) -> tuple[Tensor | None, ...]:
        centred, encoder = ctx.saved_tensors
        b_enc_grad = grad.sum(0)
        return None, grad.T @ centred, b_enc_grad, -(b_enc_grad @ encoder)


@torch.no_grad()
def few_above(
    centred: Float[Tensor, "batch d_in"],
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    floor: Float[Tensor, " d_sae"],
) -> bool:
    """Whether so few pre-activations exceed their floor that pairs are cheaper, judged by the first rows of the batch.

    A function of the batch and the weights alone, so a resumed run chooses as the uninterrupted one did.
    """
    sample = torch.addmm(b_enc, centred[:_SAMPLE], encoder.T)
    return int((sample > floor).sum()) < FEW * sample.numel()
