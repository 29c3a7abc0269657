"""The JumpReLU autoencoder, for inference: a pre-activation passes whole if it exceeds its feature's threshold.

Rajamanoharan et al. 2024, arXiv 2407.14435. The comparison is strict: a pre-activation equal to the threshold is off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saelab.errors import ConfigError
from saelab.sae.base import SAE


@dataclass(frozen=True, kw_only=True)
class JumpReLUConfig:
    arch: ClassVar[str] = "jumprelu"

    d_sae: int
    """Number of features."""

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise ConfigError(f"d_sae must be at least 1, got {self.d_sae}; raise it")


class JumpReLU(SAE):
    cfg: JumpReLUConfig

    def __init__(self, cfg: JumpReLUConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator=generator)
        self.threshold = nn.Parameter(torch.zeros(cfg.d_sae))

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


def jump_relu(
    pre_acts: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, "#d_sae"] | Float[Tensor, ""]
) -> Float[Tensor, "*batch d_sae"]:
    """``relu(pre_acts)`` where ``pre_acts > threshold``, else 0."""
    return pre_acts.relu() * (pre_acts > threshold)
