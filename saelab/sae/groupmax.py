"""The GroupMax autoencoder: the features stand in k equal groups, and each token keeps the largest one of each group.

f_i = ReLU(pre_acts_i) if i is the first largest of its group, else 0, as in the sparsify library. At most k features
are active, without a search among all of them; in exchange two features of one group never fire together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import ConfigError
from saelab.sae.auxk import auxk_term, check_settings
from saelab.sae.base import SAELoss, SparseActs, TrainingGradient
from saelab.sae.gradient import with_auxk
from saelab.sae.token_top import TokenTop
from saelab_kernels import chosen_gradient


@dataclass(frozen=True, kw_only=True)
class GroupMaxConfig:
    arch: ClassVar[str] = "groupmax"

    d_sae: int
    """Number of features."""
    k: int = 32
    """Number of groups, which must divide d_sae; each gives a token at most one feature."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss that revives dead features; 0 turns it off."""
    k_aux: int | None = None
    """Dead features used for each token in the auxiliary loss. Off: half the width of the input."""

    def __post_init__(self) -> None:
        check_settings(d_sae=self.d_sae, k=self.k, aux_coefficient=self.aux_coefficient, k_aux=self.k_aux)
        if self.d_sae % self.k:
            raise ConfigError(
                f"k must divide d_sae={self.d_sae} into equal groups, got {self.k}; change one of the two"
            )


class GroupMax(TokenTop):
    cfg: GroupMaxConfig

    def __init__(self, cfg: GroupMaxConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator=generator)

    def encode_sparse(self, acts: Float[Tensor, "batch d_in"]) -> SparseActs:
        """The largest feature of each group, in the order of the groups; 0 where none of a group is positive."""
        grouped = self.pre_acts(acts).unflatten(-1, (self.cfg.k, -1))
        top_acts, places = grouped.max(-1)
        return SparseActs(top_acts.relu(), places + self._first_of_group(acts.device))

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Squared error divided by d_in, plus the auxiliary loss for the features of ``dead``."""
        acts = self._checked(acts)
        feature_acts = self.encode(acts)
        error = self.decode(feature_acts) - acts
        reconstruction = error.pow(2).mean()
        aux = auxk_term(self, acts, -error, dead)
        active = feature_acts.detach() > 0
        return SAELoss(
            total=reconstruction + aux,
            reconstruction=reconstruction.detach(),
            sparsity=torch.zeros_like(reconstruction.detach()),
            aux=aux.detach(),
            fired=active.any(0),
            l0=active.sum(dtype=acts.dtype) / len(acts),
        )

    @torch.no_grad()
    def training_gradient(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> TrainingGradient:
        """``training_loss`` and its gradient."""
        acts = self._checked(acts)
        gradient = chosen_gradient(acts, acts - self.b_dec, self.layer, *self.encode_sparse(acts))
        return with_auxk(self, gradient, dead)

    def _first_of_group(self, device: torch.device) -> Int[Tensor, " k"]:
        return torch.arange(0, self.d_sae, self.d_sae // self.cfg.k, device=device)
