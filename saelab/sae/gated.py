"""The gated autoencoder: one path decides which features are on, the other how strongly.

Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 6 to 8, with the two paths' directions shared:

    pi = (x - b_dec) W_enc + b_gate
    f = 1[pi > 0] * ReLU(exp(r_mag) * ((x - b_dec) W_enc) + b_mag)         recon = f W_dec + b_dec
    loss = (|x - recon|^2 + l1_coefficient * sum_i ReLU(pi_i) + |x - ReLU(pi) sg(W_dec) - sg(b_dec)|^2) / d_in

sg stops the gradient: the third term teaches the gate, which the first leaves without any, and must not move the
decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saelab.errors import ConfigError
from saelab.sae.affine import PreActs, few_above
from saelab.sae.base import SAE, SAELoss, SparseCodes
from saelab.sae.firing import counts
from saelab.sae.progress import check_share, warmed_up
from saelab_kernels import Ragged, encode_above, ragged_decode


@dataclass(frozen=True, kw_only=True)
class GatedConfig:
    arch: ClassVar[str] = "gated"

    d_sae: int
    """Number of features."""
    l1_coefficient: float = 1.0
    """Weight of the L1 norm of the gate's positive part against the summed squared error of a token. SAEBench's 0.012
    to 0.08 are for inputs of norm 1: times sqrt(d_in) here, 0.3 to 1.9 at width 576."""
    l1_warmup_share: float = 0.05
    """Share of the training over which the coefficient rises from 0 (SAEBench: 5000 of 244,000 steps)."""

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise ConfigError(f"d_sae must be at least 1, got {self.d_sae}; raise it")
        if self.l1_coefficient < 0:
            raise ConfigError(f"l1_coefficient must not be negative, got {self.l1_coefficient}; usual is 0.3 to 2")
        check_share("l1_warmup_share", self.l1_warmup_share)


class Gated(SAE):
    """``encoder`` holds the gate's directions; there is no ``b_enc``. ``pre_acts`` are those of the magnitudes."""

    cfg: GatedConfig
    pre_act_biases = ("b_gate", "b_mag")  # r_mag is a ratio

    def __init__(self, cfg: GatedConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator=generator)
        del self.b_enc
        self.b_gate = nn.Parameter(torch.zeros(cfg.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(cfg.d_sae))

    def encode(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, dense.

        Raises:
            ShapeError: ``acts`` has another width than the SAE reads.
        """
        projections = (self._checked(acts) - self.b_dec) @ self.W_enc
        return self._magnitudes(projections).masked_fill(projections + self.b_gate <= 0, 0)

    def pre_acts(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """What a feature is if it is on, before ReLU; on is what exceeds ``activation_floor``."""
        return (self._checked(acts) - self.b_dec) @ self.W_enc * self.r_mag.exp() + self.b_mag

    @torch.no_grad()
    def sparse_codes(self, acts: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """The active features of each row. NaN counts as active, so that it does not vanish."""
        open_ = encode_above(
            self._checked(acts) - self.b_dec, self.encoder, torch.zeros_like(self.b_gate), -self.b_gate
        )
        values = self._magnitudes(open_.acts, open_)
        active = values != 0
        return SparseCodes(open_.tokens[active], open_.features[active], values[active])

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """The three terms of the paper, each divided by d_in; ``dead`` is not used."""
        acts = self._checked(acts)
        no_bias, closed = torch.zeros_like(self.b_gate), -self.b_gate.detach()
        if few_above(acts - self.b_dec, self.encoder, no_bias, closed):
            open_ = encode_above(acts - self.b_dec, self.encoder, no_bias, closed)
            gates = open_.acts + self.b_gate.index_select(0, open_.features)
            feature_acts = self._magnitudes(open_.acts, open_)
            recon = ragged_decode(open_._replace(acts=feature_acts), self.W_dec, self.b_dec)
            by_gate = ragged_decode(open_._replace(acts=gates), self.W_dec.detach(), self.b_dec.detach())
            count = counts(feature_acts, open_.features, self, len(acts))
        else:
            projections = PreActs.apply(acts, self.encoder, no_bias, self.b_dec)
            gates = (projections + self.b_gate).relu_()
            feature_acts = self._magnitudes(projections).masked_fill(gates == 0, 0)
            recon = torch.addmm(self.b_dec, feature_acts, self.W_dec)
            by_gate = torch.addmm(self.b_dec.detach(), gates, self.W_dec.detach())
            count = counts(feature_acts, None, self, len(acts))
        reconstruction = (recon - acts).pow(2).mean()
        aux = (by_gate - acts).pow(2).mean()
        coefficient = self.cfg.l1_coefficient * warmed_up(progress, share=self.cfg.l1_warmup_share)
        sparsity = gates.sum() * (coefficient / acts.numel())
        return SAELoss(
            total=reconstruction + sparsity + aux,
            reconstruction=reconstruction.detach(),
            sparsity=sparsity.detach(),
            aux=aux.detach(),
            fired=count.fired,
            l0=count.l0,
        )

    def activation_floor(self) -> Float[Tensor, " d_sae"]:
        """What the magnitude's pre-activation is where the gate opens, 0 where that is negative."""
        return (self.b_mag - self.r_mag.exp() * self.b_gate).detach().clamp_min(0)

    def _magnitudes(self, projections: Float[Tensor, "*batch"], at: Ragged | None = None) -> Float[Tensor, "*batch"]:
        if at is None:
            return torch.addcmul(self.b_mag, projections, self.r_mag.exp()).relu_()
        ratio, b_mag = (tensor.index_select(0, at.features) for tensor in (self.r_mag.exp(), self.b_mag))
        return torch.addcmul(b_mag, projections, ratio).relu_()
