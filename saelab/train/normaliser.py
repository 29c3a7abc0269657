"""One scale for all inputs, so that learning rates and coefficients carry over between models and hooks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activations.moments import ActivationStats
from saelab.errors import TrainingError


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Centres activations and scales them to mean square norm d_in; where a token has several slots, each by itself."""

    mean: Float[Tensor, "*slots d_in"]
    scale: float | Float[Tensor, " slots"]

    @classmethod
    def fitted(cls, stats: ActivationStats | tuple[ActivationStats, ...], *, centre: bool) -> Normaliser:
        """The one that fits ``stats`` (one for each slot); without ``centre`` it only scales.

        Raises:
            TrainingError: the activations do not vary, or are not finite.
        """
        if isinstance(stats, tuple):
            slots = [cls.fitted(slot, centre=centre) for slot in stats]
            return cls(torch.stack([slot.mean for slot in slots]), torch.tensor([slot.scale for slot in slots]))
        mean = stats.mean if centre else torch.zeros_like(stats.mean)
        rms = stats.centred_norm if centre else math.sqrt(stats.centred_norm**2 + float(stats.mean.pow(2).sum()))
        if not 0 < rms < math.inf:
            raise TrainingError(
                f"the activations vary by {rms} about their mean, so there is nothing to learn; choose another hook"
            )
        return cls(mean, math.sqrt(len(mean)) / rms)

    def __call__(self, acts: Float[Tensor, "batch *slots d_in"]) -> Float[Tensor, "batch *slots d_in"]:
        scale = self.scale if isinstance(self.scale, float) else self.scale[:, None]
        return (acts - self.mean) * scale

    def inverse(self, acts: Float[Tensor, "batch *slots d_in"]) -> Float[Tensor, "batch *slots d_in"]:
        """From normalised activations back to raw ones."""
        scale = self.scale if isinstance(self.scale, float) else self.scale[:, None]
        return acts / scale + self.mean

    def to(self, device: str | torch.device) -> Normaliser:
        scale = self.scale if isinstance(self.scale, float) else self.scale.to(device)
        return replace(self, mean=self.mean.to(device), scale=scale)

    @property
    def output_scale(self) -> float:
        """The scale of the last slot: that of a transcoder's output, and of the second of two models."""
        return self.scale if isinstance(self.scale, float) else float(self.scale[-1])
