"""How sparse: a controller that reaches a wished L0, and a number that tells which L0 to wish for."""

from __future__ import annotations

import logging
import math
from dataclasses import fields, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ConfigError, ShapeError
from saelab.sae.base import SAE, SAEConfig

log = logging.getLogger(__name__)

#: The setting that weighs sparsity against reconstruction, by its name in an architecture's config.
COEFFICIENTS = ("l1_coefficient", "l0_coefficient", "sparsity_coefficient")

_GAIN = 1.0  # of the proportional part; half of it left an L0 twice too high at the end, twice of it swings more
_TIME_SHARE = 0.05  # share of the training in which an error of a factor e moves the coefficient by exp(_GAIN)
_LEAST_STEPS = 50  # but no fewer steps, for Adam moves a weight by the learning rate at most and L0 lags behind
_LIMIT = math.log(1000)  # the coefficient stays within this factor of the configured one


class L0Controller:
    """Moves an architecture's sparsity coefficient until its L0 is ``target``.

    With e = log(L0 / target), held within -1 and 1: log(coefficient / configured) = I + e and I <- I + e / T at each
    step, a proportional-integral controller in logarithms, because L0 falls by a factor when the coefficient grows
    by one. T is a twentieth of the training, at least 50 steps. The first twentieth, in which L0 says nothing yet, does
    not count, nor do the steps over which an architecture warms its coefficient up.

    A coefficient at its limit, a thousand times the configured one or a thousandth, is saturated: the target is out
    of its reach, as it is where a large penalty's gradient leaves Adam nothing of the error's. That is warned of once.
    """

    def __init__(self, cfg: SAEConfig, *, target: float, n_steps: int) -> None:
        """
        Raises:
            ConfigError: the architecture has no coefficient to move, or aims at an L0 by itself.
        """
        self.cfg = cfg
        self.target = target
        self.time_constant = max(_LEAST_STEPS, _TIME_SHARE * n_steps)
        self.name = coefficient_of(cfg)
        self.begins = max(_TIME_SHARE, _warmup_share(cfg))
        self.integral = 0.0
        self.log_factor = 0.0
        self._warned = False

    @property
    def coefficient(self) -> float:
        return getattr(self.cfg, self.name) * math.exp(self.log_factor)

    @property
    def saturated(self) -> bool:
        return abs(self.log_factor) >= _LIMIT

    def apply_(self, sae: SAE) -> None:
        """Give ``sae`` the coefficient of the next step."""
        sae.cfg = replace(self.cfg, **{self.name: self.coefficient})  # type: ignore[type-var]

    def update(self, l0: float, *, progress: float) -> None:
        """Take in the L0 of a step; ``progress`` is the share of the training done."""
        if progress < self.begins:
            return
        error = max(-1.0, min(1.0, math.log(max(l0, 1e-3) / self.target)))
        self.integral = max(-_LIMIT, min(_LIMIT, self.integral + _GAIN * error / self.time_constant))
        self.log_factor = max(-_LIMIT, min(_LIMIT, self.integral + _GAIN * error))
        if self.saturated and not self._warned:
            self._warned = True
            log.warning(
                "%s is saturated at %.3g and L0 is %.1f, not %g: the coefficient cannot bring it there; "
                "lower optim.lr, or choose another target_l0 or architecture",
                self.name, self.coefficient, l0, self.target,
            )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"state": torch.tensor([self.integral, self.log_factor], dtype=torch.float64)}

    def restore_(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``tensors`` gave."""
        self.integral, self.log_factor = tensors["state"].tolist()


def coefficient_of(cfg: SAEConfig) -> str:
    """Name of the setting that decides an architecture's L0.

    Raises:
        ConfigError: there is none.
    """
    if getattr(cfg, "target_l0", None) is not None:
        raise ConfigError(f"sae.target_l0 of {cfg.arch!r} already aims at an L0 in its loss; leave out target_l0")
    names = [field.name for field in fields(cfg) if field.name in COEFFICIENTS]  # type: ignore[arg-type]
    selects = selection_of(cfg)
    if not names or (selects or "").endswith("topk") or (selects is None and getattr(cfg, "k", None) is not None):
        raise ConfigError(
            f"target_l0 needs an architecture with a sparsity coefficient, but {cfg.arch!r} has none; set sae.k"
        )
    if not getattr(cfg, names[0]) > 0:
        raise ConfigError(f"target_l0 moves sae.{names[0]} from where it is set, and it is set to 0; raise it")
    if _warmup_share(cfg) > 0.5:
        raise ConfigError(
            f"target_l0 needs a coefficient that is warmed up early, not over {_warmup_share(cfg):g} of the training; "
            "lower the warm-up share to 0.1"
        )
    return names[0]


def selection_of(cfg: SAEConfig) -> str | None:
    """What keeps features off where an architecture leaves the choice: a transcoder's activation function, a
    crosscoder's sparsity; None elsewhere."""
    return getattr(cfg, {"transcoder": "activation", "crosscoder": "sparsity"}.get(cfg.arch, ""), None)


def _warmup_share(cfg: SAEConfig) -> float:
    shares = [getattr(cfg, field.name) for field in fields(cfg) if field.name.endswith("_warmup_share")]  # type: ignore[arg-type]
    return max(shares, default=0.0)


@torch.no_grad()
def decoder_projection(
    acts: Float[Tensor, "batch d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    *,
    n: int,
) -> float:
    """How far activations reach along decoder directions that they should have nothing to do with: lower is better.

    The (n x batch)-th largest of all entries of (acts - b_dec) W_dec^T, in units of the root mean square norm of
    acts - b_dec. An SAE whose L0 is too low mixes correlated features in its rows, and then even the n-th row, with n
    well above the true L0, points along an input; too high an L0 gives mixtures too. Among SAEs of one width on one
    hook the right L0 is where this is smallest. Source: s_n^dec of Chanin and Garriga-Alonso 2025, arXiv 2508.16560.

    A hint, not a verdict: on toy data it was least at the true L0 where 50 features were orthogonal, but not where 100
    shared 64 dimensions.

    Raises:
        ShapeError: ``n`` is not between 1 and d_sae - 1.
    """
    if not 1 <= n < len(W_dec):
        raise ShapeError(f"n must be between 1 and d_sae - 1 = {len(W_dec) - 1}, got {n}; a quarter of d_sae is usual")
    centred = acts - b_dec
    projections = (centred @ torch.nn.functional.normalize(W_dec, dim=1).T).flatten()
    rank = len(projections) - n * len(acts)  # from below, counted from 1
    value = projections.kthvalue(rank).values
    return float(value / centred.square().sum(1).mean().sqrt())
