"""The BatchTopK autoencoder: a batch keeps its k-per-token largest activations wherever they fall (arXiv 2412.06410).

At inference there is no batch to compare with, so a threshold takes its place: the running mean of the smallest
activation that training batches kept. Saved, it is a JumpReLU SAE with that threshold for each feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.sae.auxk import auxk_term, check_settings
from saelab.sae.base import SAELoss, TrainingGradient
from saelab.sae.batch_threshold import BatchThreshold, check_momentum
from saelab.sae.gradient import with_auxk
from saelab_kernels import batchtopk_gradient, ragged_decode


@dataclass(frozen=True, kw_only=True)
class BatchTopKConfig:
    arch: ClassVar[str] = "batchtopk"

    d_sae: int
    """Number of features."""
    k: int = 32
    """Features kept for each token, on average over a batch."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss that revives dead features; 0 turns it off."""
    k_aux: int | None = None
    """Dead features used for each token in the auxiliary loss. Off: half the width of the input."""
    threshold_momentum: float = 0.99
    """How much of the inference threshold stays at each step; the rest comes from the step's batch."""

    def __post_init__(self) -> None:
        check_settings(d_sae=self.d_sae, k=self.k, aux_coefficient=self.aux_coefficient, k_aux=self.k_aux)
        check_momentum(self.threshold_momentum)


class BatchTopK(BatchThreshold):
    """``encode`` always uses the threshold; ``training_loss`` keeps the largest of its batch and updates it."""

    cfg: BatchTopKConfig

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Squared error divided by d_in, plus the auxiliary loss for ``dead`` features; updates the threshold."""
        acts = self._checked(acts)
        active = self._largest(acts - self.b_dec)
        error = ragged_decode(active, self.W_dec, self.b_dec) - acts
        reconstruction = error.pow(2).mean()
        aux = auxk_term(self, acts, -error, dead)
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=acts.device)
        fired[active.features] = True
        return SAELoss(
            total=reconstruction + aux,
            reconstruction=reconstruction.detach(),
            sparsity=torch.zeros_like(reconstruction.detach()),
            aux=aux.detach(),
            fired=fired,
            l0=acts.new_tensor(len(active.features) / len(acts)),
        )

    def training_gradient(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> TrainingGradient:
        """``training_loss`` and its gradient; updates the threshold as well."""
        acts = self._checked(acts)
        gradient = batchtopk_gradient(acts, self.layer, self.cfg.k)
        self._update_threshold(gradient.acts)
        return with_auxk(self, gradient, dead)
