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

from saelab.sae.auxk import auxk_loss, check_settings
from saelab.sae.base import SAE, SAELoss, TrainingGradient
from saelab.sae.batch_threshold import check_momentum, jumprelu_twin, update_threshold_
from saelab.sae.gradient import with_auxk
from saelab.sae.jumprelu import JumpReLU, jump_relu
from saelab.sae.spread import largest_of_batch, smallest_kept
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


class BatchTopK(SAE):
    """``encode`` always uses the threshold; ``training_loss`` keeps the largest of its batch and updates it."""

    cfg: BatchTopKConfig
    threshold: Float[Tensor, ""]
    n_updates: Tensor

    def __init__(self, cfg: BatchTopKConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator=generator)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Squared error divided by d_in, plus the auxiliary loss for ``dead`` features; updates the threshold."""
        acts = self._checked(acts)
        n_kept = self.cfg.k * len(acts) * self.tokens.size
        active = largest_of_batch(acts - self.b_dec, self.encoder, self.b_enc, n_kept, self.tokens)
        self._update_threshold(smallest_kept(active.acts.detach(), self.tokens))
        error = ragged_decode(active, self.W_dec, self.b_dec) - acts
        reconstruction = error.pow(2).mean()
        k_aux = self.cfg.k_aux or max(1, self.d_in // 2)
        revived = dead if self.cfg.aux_coefficient else None
        aux = self.cfg.aux_coefficient * auxk_loss(self, acts, -error, revived, k_aux=k_aux)
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
        return with_auxk(self, gradient, dead, aux_coefficient=self.cfg.aux_coefficient, k_aux=self.cfg.k_aux)

    @torch.no_grad()
    def fold_(self, mean: Float[Tensor, "*slots d_in"], scale: float | Float[Tensor, " slots"]) -> None:
        """As every SAE; the threshold is in units of the activations."""
        super().fold_(mean, scale)
        self.threshold.div_(scale)

    def as_jumprelu(self) -> JumpReLU:
        """The SAE that it is at inference."""
        return jumprelu_twin(self, self.threshold)

    def activation_floor(self) -> Float[Tensor, " d_sae"]:
        """The one threshold of all features, 0 where it is negative."""
        return self.threshold.clamp_min(0).expand(self.d_sae)

    def _activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return jump_relu(pre_acts, self.threshold)

    def _update_threshold(self, kept: Float[Tensor, " kept"]) -> None:
        update_threshold_(self.threshold, self.n_updates, kept, momentum=self.cfg.threshold_momentum)
