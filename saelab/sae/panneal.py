"""The p-annealed autoencoder: an L1 penalty that turns towards L0 (Karvonen et al. 2024, arXiv 2408.00113, section 4).

    f = ReLU((x - b_dec) W_enc + b_enc)      recon = f W_dec + b_dec
    loss = (|x - recon|^2 + c_s sum_i f_i^p_s) / d_in,      p_s from 1 to p_end over the training
    c_{s+1} = c_s * mean_x sum_i f_i^p_s / mean_x sum_i f_i^p_{s+1}

The coefficient c follows p so that a change of p alone leaves the penalty as large as it was. The paper changes p a few
times and takes the means over a queue of recent batches; here p moves a little at every step and the means are those of
the step's batch, so that noise averages out over steps and two numbers in the state dict replace the queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.sae.base import SAE, SAELoss
from saelab.sae.firing import autoencode_relu
from saelab.sae.progress import annealed, check_share, warmed_up

#: Below this activation f^p continues as the straight line to 0: its slope, unbounded for p < 1, would otherwise let
#: one tiny activation decide the direction of a clipped gradient. With mean |x|^2 = d_in activations are about 1.
SMALL = 1e-3


@dataclass(frozen=True, kw_only=True)
class PAnnealConfig:
    arch: ClassVar[str] = "panneal"

    d_sae: int
    """Number of features."""
    l1_coefficient: float = 1.0
    """Weight of the penalty against the summed squared error of a token while p is 1; later it follows p."""
    p_end: float = 0.2
    """The last p, as in SAEBench."""
    anneal_start: float = 0.1
    """Share of the training after which p leaves 1; it reaches ``p_end`` with the last step."""
    l1_warmup_share: float = 0.05
    """Share of the training over which the coefficient rises from 0 (SAEBench: 5000 of 244,000 steps)."""

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise ConfigError(f"d_sae must be at least 1, got {self.d_sae}; raise it")
        if self.l1_coefficient < 0:
            raise ConfigError(f"l1_coefficient must not be negative, got {self.l1_coefficient}; usual is 0.1 to 10")
        if not 0 < self.p_end <= 1:
            raise ConfigError(f"p_end must be above 0 and at most 1, got {self.p_end}; usual is 0.2")
        check_share("l1_warmup_share", self.l1_warmup_share)
        if not 0 <= self.anneal_start < 1:
            raise ConfigError(
                f"anneal_start is a share of the training, at least 0 and below 1, got {self.anneal_start}"
            )

    def p_at(self, progress: float) -> float:
        """The exponent when the share ``progress`` of the training is done."""
        return annealed(progress, first=1.0, last=self.p_end, start=self.anneal_start)


class PAnneal(SAE):
    """A ReLU autoencoder. ``training_loss`` moves ``p`` and, with it, ``coefficient_ratio``."""

    cfg: PAnnealConfig
    p: Float[Tensor, ""]
    coefficient_ratio: Float[Tensor, ""]

    def __init__(self, cfg: PAnnealConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator=generator)
        self.register_buffer("p", torch.ones(()))
        self.register_buffer("coefficient_ratio", torch.ones(()))

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Squared error plus the penalty, both divided by d_in; moves p along. ``dead`` is not used."""
        acts = self._checked(acts)
        firing = autoencode_relu(self, acts)
        reconstruction = (firing.recon - acts).pow(2).mean()
        self._move_p(firing.acts.detach(), self.cfg.p_at(progress))
        coefficient = self.cfg.l1_coefficient * warmed_up(progress, share=self.cfg.l1_warmup_share)
        penalty = lp_penalty(firing.acts, float(self.p))
        sparsity = penalty * (self.coefficient_ratio * coefficient / acts.numel())
        return SAELoss(
            total=reconstruction + sparsity,
            reconstruction=reconstruction.detach(),
            sparsity=sparsity.detach(),
            aux=torch.zeros_like(sparsity.detach()),
            fired=firing.fired,
            l0=firing.l0,
        )

    def activation_floor(self) -> Float[Tensor, " d_sae"]:
        """0 for every feature."""
        return self.b_enc.new_zeros(self.d_sae)

    def _activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return pre_acts.relu()

    @torch.no_grad()
    def _move_p(self, acts: Float[Tensor, ...], p: float) -> None:
        """Change the exponent, and the coefficient by as much as the penalty of ``acts`` changes with it.

        Where nothing is active, or something is not finite, there is no ratio to take and both stay.
        """
        before = float(self.p)
        target = float(torch.tensor(p, dtype=self.p.dtype))
        if target == before:
            return
        ratio = lp_penalty(acts, before) / lp_penalty(acts, target)
        if torch.isfinite(ratio):
            self.coefficient_ratio.mul_(ratio)
            self.p.fill_(target)


def lp_penalty(acts: Float[Tensor, ...], p: float) -> Float[Tensor, ""]:
    """``sum f^p`` over activations f >= 0, with a straight line to the origin below ``SMALL``; at p = 1 the L1 norm."""
    if p == 1:
        return acts.sum()
    return (acts * acts.clamp_min(SMALL).pow(p - 1)).sum()
