"""The ReLU autoencoder with an L1 penalty (Bricken et al. 2023, transformer-circuits.pub/2023/monosemantic-features).

f = ReLU((x - b_dec) W_enc + b_enc)      recon = f W_dec + b_dec
loss = (|x - recon|^2 + l1_coefficient * sum_i f_i) / d_in,  or with sum_i f_i |W_dec,i| (Anthropic, April 2024)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.sae.base import SAE, SAELoss
from saelab.sae.firing import autoencode_relu
from saelab.sae.progress import check_share, warmed_up


@dataclass(frozen=True, kw_only=True)
class ReLUConfig:
    arch: ClassVar[str] = "relu"

    d_sae: int
    """Number of features."""
    l1_coefficient: float = 1.0
    """Weight of the L1 norm of the feature activations against the summed squared error of a token."""
    b_dec: Literal["learned", "zero"] = "learned"
    """With "zero", f = ReLU(acts W_enc + b_enc) and recon = f W_dec exactly, and training does not centre its input."""
    weight_l1_by_decoder_norm: bool = False
    """Weight each activation in the penalty by the norm of its row of W_dec, and leave that norm free in training."""
    l1_warmup_share: float = 0.05
    """Share of the training over which the coefficient rises from 0 (Anthropic, April 2024: the first 5 %)."""

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise ConfigError(f"d_sae must be at least 1, got {self.d_sae}; raise it")
        if self.l1_coefficient < 0:
            raise ConfigError(f"l1_coefficient must not be negative, got {self.l1_coefficient}; usual is 0.1 to 10")
        check_share("l1_warmup_share", self.l1_warmup_share)


class ReLU(SAE):
    cfg: ReLUConfig

    def __init__(self, cfg: ReLUConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator=generator)
        self.b_dec.requires_grad_(cfg.b_dec == "learned")

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Squared error plus ``l1_coefficient`` times the L1 norm, both divided by d_in; ``dead`` is not used."""
        acts = self._checked(acts)
        firing = autoencode_relu(self, acts)
        reconstruction = (firing.recon - acts).pow(2).mean()
        weighted = firing.acts
        # plain L1 would be escaped by small activations and long decoder rows; unit rows or this weight prevent it
        if self.cfg.weight_l1_by_decoder_norm:
            weighted = weighted * firing.at_acts(torch.linalg.vector_norm(self.W_dec, dim=1))
        coefficient = self.cfg.l1_coefficient * warmed_up(progress, share=self.cfg.l1_warmup_share)
        sparsity = weighted.sum() * (coefficient / acts.numel())
        return SAELoss(
            total=reconstruction + sparsity,
            reconstruction=reconstruction.detach(),
            sparsity=sparsity.detach(),
            aux=torch.zeros_like(sparsity.detach()),
            fired=firing.fired,
            l0=firing.l0,
        )

    def normalise_decoder_(self) -> None:
        """Scale each row of W_dec to norm 1, unless its norm is free."""
        if not self.cfg.weight_l1_by_decoder_norm:
            super().normalise_decoder_()

    def project_decoder_grad_(self) -> None:
        """Remove the part of the gradient along each row, unless its norm is free."""
        if not self.cfg.weight_l1_by_decoder_norm:
            super().project_decoder_grad_()

    @torch.no_grad()
    def fold_(self, mean: Float[Tensor, "*slots d_in"], scale: float | Float[Tensor, " slots"]) -> None:
        """As every SAE; free decoder norms move into the encoder, so that rows of W_dec have norm 1 in the result.

        Raises:
            ConfigError: a mean to fold, but b_dec is fixed at zero.
        """
        if self.cfg.b_dec == "zero" and mean.any():
            raise ConfigError('an SAE with b_dec = "zero" has no place for a mean; train it on uncentred activations')
        super().fold_(mean, scale)
        if self.cfg.weight_l1_by_decoder_norm:
            norms = self.W_dec.norm(dim=1)
            self.encoder.mul_(norms[:, None])
            self.b_enc.mul_(norms)
            super().normalise_decoder_()

    def activation_floor(self) -> Float[Tensor, " d_sae"]:
        """0 for every feature."""
        return self.b_enc.new_zeros(self.d_sae)

    def _activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return pre_acts.relu()
