"""Definition of AuxK, the loss that revives dead features, on the dead rows packed into a small dictionary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab_kernels.encode.reference import largest


def aux_loss(
    rows: Tensor, residual: Tensor, centred: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k_aux: int
) -> Tensor:
    """sum |residual - recon|^2 / sum |residual - mean(residual)|^2, with recon from the k_aux largest dead features.

    rows int64 [n_dead], residual and centred [N, d], W_enc and W_dec [F, d], b_enc [F]; a scalar. Source: Gao et al.
    2024, arXiv 2406.04093, A.2.
    """
    acts = F.linear(centred, W_enc[rows], b_enc[rows])
    kept = largest(acts.detach(), min(k_aux, len(rows)))
    acts = torch.zeros_like(acts).scatter(1, kept, acts.gather(1, kept)).relu()
    unexplained = (acts @ W_dec[rows] - residual).pow(2).sum()
    variance = (residual - residual.mean(0)).pow(2).sum()
    return unexplained / variance.clamp_min(torch.finfo(variance.dtype).tiny)


def aux_dead(
    rows: Tensor, residual: Tensor, centred: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k_aux: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss and its gradient in the dead rows of W_enc [n_dead, d], b_enc [n_dead] and W_dec [n_dead, d]."""
    encoder, bias, decoder = (tensor[rows].detach().requires_grad_() for tensor in (W_enc, b_enc, W_dec))
    every = torch.arange(len(rows), device=rows.device)
    with torch.enable_grad():
        loss = aux_loss(every, residual.detach(), centred.detach(), encoder, bias, decoder, k_aux)
    encoder_grad, bias_grad, decoder_grad = torch.autograd.grad(loss, (encoder, bias, decoder))
    return loss.detach(), encoder_grad, bias_grad, decoder_grad
