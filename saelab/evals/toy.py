"""Toy ground truth: activations made of known features, so that what an SAE finds can be compared with what is there.

    acts = sum_i magnitude_i * fires_i * direction_i

Feature i (from 0) fires with probability proportional to (i + 1)^-exponent, scaled so that ``l0`` features fire on
average; a firing feature's magnitude is uniform on ``magnitudes``. Directions are random unit vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.activations.moments import ActivationStats, moments
from saelab.activations.permutation import mixed_key
from saelab.errors import ConfigError

Kind = Literal["independent", "hierarchical", "correlated"]

_CALIBRATION_TOKENS = 65_536


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """A world of known features."""

    n_features: int = 256
    """True features."""
    d: int = 96
    """Width of the activations."""
    exponent: float = 0.5
    """Power law of the frequencies: 0 makes all features equally frequent, 1 is Zipf's law."""
    l0: float = 4.0
    """Features that fire on a token, on average."""
    kind: Kind = "independent"
    """independent; hierarchical: each feature has a parent, and fires only where the parent does; correlated: features
    come in groups of ``group_size`` whose firing depends on a common cause."""
    group_size: int = 4
    """Features in a group: a parent with its children, or features with a common cause."""
    correlation: float = 0.6
    """Of the Gaussian variables behind the firing of two features of a group (correlated only)."""
    magnitudes: tuple[float, float] = (0.5, 1.5)
    """Range of a firing feature's magnitude."""
    batch_size: int = 1024
    """Tokens in a batch."""
    seed: int = 0
    """Seed of the directions and of all tokens."""

    def __post_init__(self) -> None:
        if self.n_features < 2 or self.d < 2 or self.batch_size < 1:
            raise ConfigError(
                f"a toy world needs at least 2 features in 2 dimensions and batches of 1 token, got {self.n_features}, "
                f"{self.d} and {self.batch_size}; raise them"
            )
        if not 0 < self.l0 <= self.n_features / 4:
            raise ConfigError(
                f"l0 must be above 0 and at most a quarter of n_features={self.n_features}, got {self.l0}; "
                "4 of 256 is usual"
            )
        if not 1 <= self.group_size <= self.n_features:
            raise ConfigError(f"group_size must be between 1 and n_features={self.n_features}, got {self.group_size}")
        if not 0 <= self.exponent <= 3:
            raise ConfigError(f"exponent must be between 0 and 3, got {self.exponent}; 0.5 and 1 are usual")
        if not 0 <= self.correlation < 1:
            raise ConfigError(f"correlation must be at least 0 and below 1, got {self.correlation}; 0.6 is usual")
        low, high = self.magnitudes
        if not 0 < low <= high:
            raise ConfigError(
                f"magnitudes must be two positive numbers in order, got {low} and {high}; turn them round"
            )


class ToySample(NamedTuple):
    """Tokens of the world, and the truth about them."""

    acts: Float[Tensor, "tokens d"]
    codes: Float[Tensor, "tokens n_features"]  # magnitude where the feature fires, else 0


class ToyBatches:
    """Endless batches of a toy world. Like batches from a store, each is a function of its step alone."""

    def __init__(self, config: ToyConfig) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(mixed_key(config.seed, 0) % 2**63)
        directions = torch.randn(config.n_features, config.d, generator=generator)
        self.directions: Float[Tensor, "n_features d"] = torch.nn.functional.normalize(directions, dim=1)
        self.group = torch.arange(config.n_features) % (config.n_features // config.group_size)
        self.is_parent = torch.arange(config.n_features) < config.n_features // config.group_size
        self.frequency: Float[Tensor, " n_features"] = _frequencies(config)
        if config.kind == "hierarchical":
            self.frequency = self._below_parents(self.frequency)

    @property
    def d_in(self) -> int:
        return self.config.d

    def at(self, step: int) -> Float[Tensor, "batch d"]:
        """The batch of ``step`` (from 0)."""
        return self.sample(step).acts

    def sample(self, step: int) -> ToySample:
        """The batch of ``step`` with its true codes."""
        config = self.config
        generator = torch.Generator().manual_seed(mixed_key(config.seed, 1, step) % 2**63)
        fires = self._fires(config.batch_size, generator)
        low, high = config.magnitudes
        codes = fires * (low + (high - low) * torch.rand(fires.shape, generator=generator))
        return ToySample(codes @ self.directions, codes)

    def statistics(self, max_tokens: int = _CALIBRATION_TOKENS) -> ActivationStats:
        """Statistics over the first batches."""
        n_batches = max(1, -(-min(max_tokens, _CALIBRATION_TOKENS) // self.config.batch_size))
        return moments(self.at(step) for step in range(n_batches))

    def _fires(self, n_tokens: int, generator: torch.Generator) -> Bool[Tensor, "tokens n_features"]:
        config = self.config
        match config.kind:
            case "independent":
                return torch.rand(n_tokens, config.n_features, generator=generator) < self.frequency
            case "hierarchical":
                # a child's chance, given its parent: what makes its overall frequency come out
                parent = self.group  # parents are the first features, one a group
                chance = torch.where(self.is_parent, self.frequency, self.frequency / self.frequency[parent])
                own = torch.rand(n_tokens, config.n_features, generator=generator) < chance
                return own & (self.is_parent | own[:, parent])
            case "correlated":
                common = torch.randn(n_tokens, int(self.group.max()) + 1, generator=generator)[:, self.group]
                own = torch.randn(n_tokens, config.n_features, generator=generator)
                z = config.correlation**0.5 * common + (1 - config.correlation) ** 0.5 * own
                return z < torch.special.ndtri(self.frequency.double()).float()

    def _below_parents(self, frequency: Float[Tensor, " n_features"]) -> Float[Tensor, " n_features"]:
        """Frequencies at which no child is more than half as frequent as its parent, for the same l0."""
        capped = torch.where(self.is_parent, frequency, torch.minimum(frequency, frequency[self.group] / 2))
        return capped * (self.config.l0 / float(capped.sum()))


def _frequencies(config: ToyConfig) -> Float[Tensor, " n_features"]:
    """Firing probabilities with sum l0; none above 1/2, the rest of the power law scaled up for what that cuts off."""
    law = torch.arange(1, config.n_features + 1, dtype=torch.float64) ** -config.exponent
    low, high = 0.0, config.n_features * config.l0
    for _ in range(100):  # bisection: the sum of the capped law rises with its scale
        scale = (low + high) / 2
        low, high = (low, scale) if float((scale * law).clamp(max=0.5).sum()) > config.l0 else (scale, high)
    return (scale * law).clamp(max=0.5).float()
