"""The JumpReLU autoencoder: a pre-activation passes whole if it exceeds its feature's threshold.

Rajamanoharan et al. 2024, arXiv 2407.14435. With z = (x - b_dec) W_enc + b_enc and H the step function (H(0) = 0):

    f = z H(z - theta)      recon = f W_dec + b_dec      loss = |x - recon|^2 / d_in + penalty
    "step"       l0_coefficient * mean_x L0(x) / d_in,  L0 = sum_i H(z_i - theta_i)                     (their eq. 9)
    "quadratic"  l0_coefficient * (mean_x L0(x) / target_l0 - 1)^2          (Gemma Scope 2; as in dictionary_learning)
    "tanh"       l0_coefficient * mean_x sum_i tanh(tanh_scale f_i) / d_in    (Anthropic, January 2025; |W_dec,i| = 1)

The gradient of the jump is a straight-through estimate over a window of width eps around the threshold (eq. 11, 12):
df / dtheta = -theta / eps and dH / dtheta = -1 / eps where |z - theta| < eps / 2. For "tanh" the same goes to z with
the opposite sign, so that encoders learn from it as well (Anthropic); for the others z gets df / dz = H alone.

The threshold is itself the parameter, in float32, and not its logarithm, which Adam's steps of about the learning rate
cannot move far. The comparison is strict: a pre-activation equal to the threshold is off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saelab.errors import ConfigError
from saelab.sae.affine import PreActs, few_above
from saelab.sae.base import SAE, SAELoss
from saelab.sae.firing import counts
from saelab.sae.progress import check_share, warmed_up
from saelab_kernels import encode_jumprelu, ragged_decode


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig:
    arch: ClassVar[str] = "jumprelu"

    d_sae: int
    """Number of features."""
    penalty: Literal["step", "quadratic", "tanh"] = "tanh"
    """What keeps features off; the formulas stand at the top of this file. "tanh" teaches encoders too and so becomes
    sparse in far fewer tokens; the other two move thresholds alone."""
    l0_coefficient: float = 1.0
    """Weight of the penalty: against the summed squared error of a token for "step" and "tanh", against the unexplained
    share of the input for "quadratic" (1 in dictionary_learning)."""
    target_l0: float | None = None
    """Active features per token at which the "quadratic" penalty is 0; the other penalties have no target."""
    l0_warmup_share: float = 0.1
    """Share of the training over which the coefficient rises from 0. Anthropic: 1 with the penalty "tanh"."""
    bandwidth: float | None = None
    """Width of the window around a threshold whose pre-activations estimate its gradient; these have variance 1 at the
    start. Off: 2 for "tanh" (Anthropic), else 0.1. Gemma Scope: 0.001 for inputs of norm 1, times sqrt(d_in) here."""
    initial_threshold: float | None = None
    """Off: 0.1 for "tanh" (Anthropic); else what pre-activations of variance 1 exceed target_l0 times a token (64 times
    without a target). Thresholds move by about the learning rate a step, so from 0.1 they would need 10^4 steps."""
    tanh_scale: float = 4.0
    """Steepness of "tanh" (Anthropic)."""
    pre_act_coefficient: float | None = None
    """Weight of mean_x sum_i ReLU(theta_i - z_i) / d_in over dead features, which brings them back (Anthropic, there
    over all features: 3e-6)."""

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise ConfigError(f"d_sae must be at least 1, got {self.d_sae}; raise it")
        if self.l0_coefficient < 0:
            raise ConfigError(f"l0_coefficient must not be negative, got {self.l0_coefficient}; usual is 0.1 to 10")
        if (self.penalty == "quadratic") != (self.target_l0 is not None):
            raise ConfigError(
                f'target_l0 belongs to penalty = "quadratic", got {self.target_l0} with "{self.penalty}"; set both'
            )
        if self.target_l0 is not None and not 0 < self.target_l0 <= self.d_sae:
            raise ConfigError(f"target_l0 must be above 0 and at most d_sae={self.d_sae}, got {self.target_l0}")
        check_share("l0_warmup_share", self.l0_warmup_share)
        for name in ("bandwidth", "tanh_scale"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}; leave it out for the default")
        for name in ("initial_threshold", "pre_act_coefficient"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ConfigError(
                    f"{name} must not be negative, got {getattr(self, name)}; leave it out for the default"
                )

    @property
    def window(self) -> float:
        """The bandwidth, given or default."""
        return self.bandwidth if self.bandwidth is not None else 2.0 if self.penalty == "tanh" else 0.1

    @property
    def first_threshold(self) -> float:
        """The initial threshold, given or default."""
        if self.initial_threshold is not None:
            return self.initial_threshold
        if self.penalty == "tanh":
            return 0.1
        n_active = self.target_l0 if self.target_l0 is not None else 64
        return NormalDist().inv_cdf(1 - min(0.5, n_active / self.d_sae))

    def coefficient_at(self, progress: float) -> float:
        """The weight of the penalty when the share ``progress`` of the training is done."""
        return self.l0_coefficient * warmed_up(progress, share=self.l0_warmup_share)


class JumpReLU(SAE):
    """Gemma Scope trains it with Adam's betas (0, 0.999) and a learning rate of 7e-5."""

    cfg: JumpReLUConfig

    def __init__(self, cfg: JumpReLUConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator=generator)
        self.threshold = nn.Parameter(torch.full((cfg.d_sae,), cfg.first_threshold))

    @property
    def lr_factors(self) -> dict[str, float]:
        """Gemma Scope's inputs have norm 1 and ours sqrt(d_in), so its thresholds move that much farther at a step.
        Without the factor a short run hardly leaves the first threshold."""
        return {"threshold": math.sqrt(self.d_in)}

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Squared error divided by d_in plus the penalty, and if asked the pre-activation loss of ``dead`` features."""
        acts = self._checked(acts)
        jump = self._jump(acts)
        reconstruction = (jump.recon - acts).pow(2).mean()
        sparsity = self.cfg.coefficient_at(progress) * self._penalty(jump, len(acts))
        aux = self._pre_act_loss(acts, dead)
        fired, l0 = counts(jump.acts, jump.features, self, len(acts))
        return SAELoss(
            total=reconstruction + sparsity + aux,
            reconstruction=reconstruction.detach(),
            sparsity=sparsity.detach(),
            aux=aux.detach(),
            fired=fired,
            l0=l0,
        )

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """As every SAE after a step; thresholds that it has moved below 0 return to 0."""
        super().normalise_decoder_()
        self.threshold.clamp_(min=0)

    @torch.no_grad()
    def fold_(self, mean: Float[Tensor, "*slots d_in"], scale: float | Float[Tensor, " slots"]) -> None:
        """As every SAE; thresholds are in units of the activations."""
        super().fold_(mean, scale)
        self.threshold.copy_(self.threshold.double() / scale)

    def activation_floor(self) -> Float[Tensor, " d_sae"]:
        """The threshold, 0 where it is negative."""
        return self.threshold.detach().clamp_min(0)

    def _activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return jump_relu(pre_acts, self.threshold)

    def _jump(self, acts: Float[Tensor, "batch d_in"]) -> Jump:
        """Over the pairs near or above their threshold where these are few and z needs no straight-through gradient."""
        eps, to_pre_acts = self.cfg.window, self.cfg.penalty == "tanh"
        centred, threshold = acts - self.b_dec, self.threshold.clamp_min(0)
        if not to_pre_acts and few_above(centred, self.encoder, self.b_enc, threshold - eps / 2):
            active, _, step = encode_jumprelu(centred, self.encoder, self.b_enc, threshold, bandwidth=eps)
            recon = ragged_decode(active, self.W_dec, self.b_dec)
            return Jump(recon, active.acts, active.features, step.sum() / len(acts))
        pre_acts = PreActs.apply(acts, self.encoder, self.b_enc, self.b_dec)
        feature_acts, l0 = StraightThrough.apply(pre_acts, threshold, eps, to_pre_acts)
        return Jump(torch.addmm(self.b_dec, feature_acts, self.W_dec), feature_acts, None, l0)

    def _penalty(self, jump: Jump, n_tokens: int) -> Float[Tensor, ""]:
        if self.cfg.penalty == "step":
            return jump.l0 / self.d_in
        if self.cfg.penalty == "tanh":
            return torch.tanh(self.cfg.tanh_scale * jump.acts).sum() / (n_tokens * self.d_in)
        assert self.cfg.target_l0 is not None
        # the square of the whole batch's mean, with this process's share of its gradient
        excess = self.tokens.mean(jump.l0.detach()) / self.cfg.target_l0 - 1
        return excess.square() + 2 * excess * (jump.l0 - jump.l0.detach()) / self.cfg.target_l0

    def _pre_act_loss(
        self, acts: Float[Tensor, "batch d_in"], dead: Bool[Tensor, " d_sae"] | None
    ) -> Float[Tensor, ""]:
        if dead is None or self.cfg.pre_act_coefficient is None:
            return acts.new_zeros(())
        rows = dead.nonzero().flatten()
        pre_acts = (acts - self.b_dec) @ self.encoder[rows].T + self.b_enc[rows]
        return (self.threshold[rows] - pre_acts).relu().sum() * (self.cfg.pre_act_coefficient / acts.numel())


class Jump(NamedTuple):
    """A batch after the jump: all activations, or those of the pairs that have one or are near their threshold."""

    recon: Float[Tensor, "batch d_out"]
    acts: Float[Tensor, " pairs"] | Float[Tensor, "batch d_sae"]
    features: Int[Tensor, " pairs"] | None  # None where acts are dense
    l0: Float[Tensor, ""]  # with a straight-through gradient


class StraightThrough(torch.autograd.Function):
    """``z H(z - theta)`` [batch, d_sae] and the mean of ``sum_i H(z_i - theta_i)``, with the gradients stated above."""

    @staticmethod
    def forward(
        ctx: Any,
        pre_acts: Float[Tensor, "batch d_sae"],
        threshold: Float[Tensor, " d_sae"],
        bandwidth: float,
        to_pre_acts: bool,
    ) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, ""]]:
        off = pre_acts <= threshold  # NaN is on, so that it does not vanish
        ctx.save_for_backward(pre_acts, threshold, off)
        ctx.bandwidth, ctx.to_pre_acts = bandwidth, to_pre_acts
        l0 = off.shape[1] - off.sum().to(pre_acts.dtype) / len(off)
        return pre_acts.masked_fill(off, 0), l0

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, acts_grad: Float[Tensor, "batch d_sae"], l0_grad: Float[Tensor, ""]
    ) -> tuple[Tensor | None, ...]:
        pre_acts, threshold, off = ctx.saved_tensors
        pre_grad = acts_grad.masked_fill(off, 0)
        threshold_grad = torch.zeros_like(threshold)
        # a few rows at a time: what is near the threshold needs four passes, which a cache then serves
        for part, grad, out in zip(*(t.split(_ROWS) for t in (pre_acts, acts_grad, pre_grad)), strict=True):
            near = (part - threshold).abs_() < ctx.bandwidth / 2
            through = torch.addcmul(l0_grad / len(pre_acts), threshold, grad).mul_(near).div_(ctx.bandwidth)
            threshold_grad -= through.sum(0)
            if ctx.to_pre_acts:
                out += through
        return pre_grad, threshold_grad, None, None


_ROWS = 128


def jump_relu(
    pre_acts: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, "#d_sae"] | Float[Tensor, ""]
) -> Float[Tensor, "*batch d_sae"]:
    """``relu(pre_acts)`` where ``pre_acts > threshold``, else 0."""
    return pre_acts.relu() * (pre_acts > threshold)
