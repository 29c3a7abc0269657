"""From the kernels' gradient of the reconstruction to that of the whole training loss: AuxK and the counts added."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.sae.auxk import n_revived
from saelab.sae.base import SAE, SAELoss, TrainingGradient
from saelab_kernels import Gradient, RowGrads, aux_dead


def with_auxk(sae: SAE, gradient: Gradient, dead: Bool[Tensor, " d_sae"] | None) -> TrainingGradient:
    """The losses of a batch and their gradient: those of ``gradient``, plus AuxK for the features of ``dead``."""
    error, aux_coefficient = gradient.error, sae.cfg.aux_coefficient  # type: ignore[attr-defined]
    rows = dead.nonzero().flatten() if dead is not None and aux_coefficient else None
    aux, sparse = error.new_zeros(()), gradient.sparse
    if rows is not None and len(rows):
        layer, residual, k_aux = sae.layer, error.neg(), n_revived(sae.cfg, sae.d_in)
        revived = aux_dead(rows, residual, sparse.centred, layer.W_enc, layer.b_enc, layer.W_dec, k_aux)
        aux = aux_coefficient * revived.loss
        sparse = sparse._replace(
            b_enc=sparse.b_enc.index_add(0, rows, revived.b_enc_grad, alpha=aux_coefficient),
            extra=RowGrads(rows, revived.W_enc_grad.mul_(aux_coefficient), revived.W_dec_grad.mul_(aux_coefficient)),
        )
    active = gradient.acts > 0
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=error.device)
    fired[gradient.features[active]] = True
    losses = SAELoss(
        total=gradient.loss + aux,
        reconstruction=gradient.loss,
        sparsity=error.new_zeros(()),
        aux=aux,
        fired=fired,
        l0=active.sum(dtype=error.dtype) / len(error),
    )
    return TrainingGradient(losses, sparse)
