"""The TopK autoencoder: each token keeps its k largest pre-activations (Gao et al. 2024, arXiv 2406.04093)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.sae.auxk import auxk_term, check_settings
from saelab.sae.base import SAELoss, SparseActs, TrainingGradient
from saelab.sae.gradient import with_auxk
from saelab.sae.token_top import TokenTop
from saelab_kernels import Autoencoded, autoencode_topk, encode_topk, topk_gradient


@dataclass(frozen=True, kw_only=True)
class TopKConfig:
    arch: ClassVar[str] = "topk"

    d_sae: int
    """Number of features."""
    k: int = 32
    """Features kept for each token."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss that revives dead features; 0 turns it off."""
    k_aux: int | None = None
    """Dead features used for each token in the auxiliary loss. Off: half the width of the input."""

    def __post_init__(self) -> None:
        check_settings(d_sae=self.d_sae, k=self.k, aux_coefficient=self.aux_coefficient, k_aux=self.k_aux)


class TopK(TokenTop):
    cfg: TopKConfig

    def __init__(self, cfg: TopKConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator=generator)

    def encode_sparse(self, acts: Float[Tensor, "batch d_in"]) -> SparseActs:
        """The k features of each token, largest first."""
        return SparseActs(*encode_topk(self._checked(acts) - self.b_dec, self.encoder, self.b_enc, self.cfg.k))

    def forward(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction; no dense feature activations are made on the way."""
        return self._autoencode(self._checked(acts).reshape(-1, self.d_in)).recon.view(acts.shape)

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Squared error divided by d_in, plus the auxiliary loss for the features of ``dead``."""
        recon, top_acts, top_indices = self._autoencode(self._checked(acts))
        error = recon - acts
        reconstruction = error.pow(2).mean()
        aux = auxk_term(self, acts, -error, dead)
        active = top_acts.detach() > 0
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=acts.device)
        fired[top_indices[active]] = True
        return SAELoss(
            total=reconstruction + aux,
            reconstruction=reconstruction.detach(),
            sparsity=torch.zeros_like(reconstruction.detach()),
            aux=aux.detach(),
            fired=fired,
            l0=active.sum(dtype=acts.dtype) / len(acts),
        )

    def training_gradient(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> TrainingGradient:
        """``training_loss`` and its gradient."""
        acts = self._checked(acts)
        gradient = topk_gradient(acts, self.layer, self.cfg.k)
        return with_auxk(self, gradient, dead)

    def _autoencode(self, acts: Float[Tensor, "batch d_in"]) -> Autoencoded:
        return autoencode_topk(acts, self.encoder, self.b_enc, self.W_dec, self.b_dec, self.cfg.k)
