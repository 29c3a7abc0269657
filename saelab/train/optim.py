"""Adam for SAEs: its settings, and its state as named tensors, so that checkpoints need no pickle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from saelab import schedules
from saelab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    lr: float | None = None
    """Peak learning rate. Off: 2e-4 * sqrt(16384 / d_sae), as in dictionary_learning, after Gao et al. 2024, fig. 3."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the gradient's mean and square."""
    warmup_share: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    decay_share: float = 0.2
    """Share of the steps, at the end, over which it falls to 0."""
    clip_norm: float | None = None
    """Gradients of a larger norm are scaled down to it. Off: 1 / d_in, which is 1 for a loss summed over the width, as
    SAELens has it. Nearly every gradient is longer, so that Adam weighs all steps alike and the large gradients of the
    first ones do not hold back the later. 1e9 never clips."""

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 < self.lr < 1:
            raise ConfigError(f"optim.lr must be between 0 and 1, got {self.lr}; usual values are 1e-4 to 1e-3")
        for name in ("warmup_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"optim.{name} is a share of the steps, between 0 and 1, got {getattr(self, name)}; lower it"
                )

        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"optim.betas must be at least 0 and below 1, got {list(self.betas)}; usual are 0.9, 0.999"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"optim.clip_norm must be above 0, got {self.clip_norm}; set it to 1e9 for no clipping")

    def norm_limit(self, d_in: int) -> float:
        """The norm to which longer gradients are scaled."""
        return 1 / d_in if self.clip_norm is None else self.clip_norm

    def peak_lr(self, d_sae: int) -> float:
        return self.lr if self.lr is not None else 2e-4 * math.sqrt(16384 / d_sae)

    def lr_at(self, step: int, *, n_steps: int, d_sae: int) -> float:
        """Learning rate of ``step``, counted from 0."""
        return self.peak_lr(d_sae) * schedules.warmup_then_decay(
            step,
            n_steps=n_steps,
            warmup_steps=round(self.warmup_share * n_steps),
            decay_steps=round(self.decay_share * n_steps),
        )


def adam(model: nn.Module, config: OptimConfig) -> torch.optim.Adam:
    """Fused Adam: one pass over the weights, several times faster than the default on a CPU.

    Each parameter is a group of its own, with ``factor`` on its learning rate (see ``SAE.lr_factors``).
    """
    factors = getattr(model, "lr_factors", {})
    groups = [{"params": [p], "factor": factors.get(name, 1.0)} for name, p in model.named_parameters()]
    return torch.optim.Adam(groups, lr=1.0, betas=config.betas, fused=True)


def set_lr_(optimizer: torch.optim.Adam, lr: float) -> None:
    """Give each parameter its learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]
