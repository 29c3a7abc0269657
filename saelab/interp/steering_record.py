"""Does steering a feature do what its label says, more than chance would, at the same cost? A record to look up.

Cost is the next-token KL(clean || steered) on neutral prompts; effect is the rise in log-probability of the tokens
that trigger the feature. Every feature and every control direction is pushed to the same cost before comparing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.interp.steering import Edit, add_direction, add_feature, mean_norm, steer
from saelab.models.divergence import kl_divergence
from saelab.models.load import Model, Tokens
from saelab.sae.base import SAE
from saelab.stats import Interval, bootstrap, ratio

Progress = Callable[[int, int, str], None]

NEUTRAL_PROMPTS = (
    "The most important thing about", "Yesterday I went to the", "She opened the door and saw",
    "In this chapter we will discuss", "My favourite part of the day is", "The report said that",
    "When the train finally arrived,", "He looked at the table and", "One of the reasons for this is",
    "People often ask me about", "At the end of the street there was", "The meeting began with",
    "Before going to bed, they", "It is well known that", "Her answer to the question was",
    "The box on the shelf contained", "Most of the time, we", "After a long discussion, the group",
    "There are many ways to", "The first thing he noticed was",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RecordConfig:
    kl: float = 1.5
    """Cost at which features and controls are compared: next-token KL on the prompts, in nats."""
    n_random: int = 20
    """Random directions that serve as the control."""
    seed: int = 0
    """Seed of the random directions and of the bootstrap."""
    prompts: tuple[str, ...] = NEUTRAL_PROMPTS
    """Prompts that have nothing to do with any feature."""

    def __post_init__(self) -> None:
        if not self.kl > 0:
            raise ConfigError(f"kl must be above 0 nats, got {self.kl}; 1 to 2 keeps the text readable")
        if self.n_random < 1 or not self.prompts:
            raise ConfigError(
                "a record needs at least one random direction and one prompt; raise n_random or give prompts"
            )


class Pushed(NamedTuple):
    """A direction at the strength where it costs the wanted KL."""

    strength: float
    kl: float
    logps: Float[Tensor, "prompts d_vocab"]


class FeatureEffect(NamedTuple):
    feature: int
    trigger_ids: list[int]
    strength: float
    kl: float
    rise: float
    """Mean rise of the trigger tokens' log-probability over prompts, in nats."""
    random_rise: float
    """The same, averaged over the random directions."""
    random_rises: list[float]

    @property
    def advantage(self) -> float:
        """Nats by which the feature beats the mean random direction at equal cost."""
        return self.rise - self.random_rise


class SteeringRecord(NamedTuple):
    effects: list[FeatureEffect]
    random_strengths: list[float]
    advantage: Interval
    """Mean advantage over the features; the interval resamples features."""


@torch.inference_mode()
def steering_record(
    model: Model,
    sae: SAE,
    trigger_ids: Mapping[int, Sequence[int]],
    config: RecordConfig,
    *,
    progress: Progress | None = None,
) -> SteeringRecord:
    """Measure each feature of ``trigger_ids`` (feature -> token ids) against random directions at equal KL.

    Raises:
        ConfigError: no feature was given, or a direction cannot reach the KL at any strength.
    """
    if not trigger_ids:
        raise ConfigError(
            "no feature to measure was given; take some from the index, for example its most token-specific ones"
        )
    prompts = model.to_tokens(list(config.prompts))
    clean = next_token_logps(model, prompts)
    features = {i: sae.feature(i) for i in trigger_ids}
    any_feature = next(iter(features.values()))
    generator = torch.Generator().manual_seed(config.seed)
    directions = torch.randn(config.n_random, len(any_feature.direction), generator=generator)
    n_total, n_done = len(features) + config.n_random, 0

    def push(edit_at: Callable[[float], Edit]) -> Pushed:
        nonlocal n_done
        pushed = push_to_kl(model, prompts, clean, edit_at, kl=config.kl)
        n_done += 1
        if progress:
            progress(n_done, n_total, "directions")
        return pushed

    norm, hook_name = mean_norm(any_feature), any_feature.hook_name
    randoms = [push(lambda s, d=d: add_direction(hook_name, d, strength=s, mean_norm=norm)) for d in directions]  # type: ignore[misc]
    effects = []
    for i, feature in features.items():
        pushed = push(lambda s, f=feature: add_feature(f, strength=s))  # type: ignore[misc]
        ids = list(trigger_ids[i])
        rises = [mean_rise(clean, random.logps, ids) for random in randoms]
        effects.append(
            FeatureEffect(
                i, ids, pushed.strength, pushed.kl, mean_rise(clean, pushed.logps, ids), float(np.mean(rises)), rises
            )
        )
    columns = np.array([[effect.advantage, 1.0] for effect in effects])
    advantage = bootstrap(ratio, columns, seed=config.seed)
    return SteeringRecord(effects, [random.strength for random in randoms], advantage)


def next_token_logps(model: Model, prompts: Tokens) -> Float[Tensor, "prompts d_vocab"]:
    """Log-probabilities after the last real token of each prompt."""
    last = prompts.mask.sum(1) - 1
    logits = model.logits(prompts.ids, prompts.mask)
    return logits[torch.arange(len(last)), last].log_softmax(-1)


def next_token_kl(clean: Float[Tensor, "prompts d_vocab"], edited: Float[Tensor, "prompts d_vocab"]) -> float:
    """KL(clean || edited), the mean over prompts, in nats."""
    return float(next_token_kls(clean, edited).mean())


def next_token_kls(
    clean: Float[Tensor, "prompts d_vocab"], edited: Float[Tensor, "prompts d_vocab"]
) -> Float[Tensor, " prompts"]:
    """KL(clean || edited) of each prompt, in nats."""
    return kl_divergence(clean, edited)


def mean_rise(
    clean: Float[Tensor, "prompts d_vocab"], edited: Float[Tensor, "prompts d_vocab"], ids: Sequence[int]
) -> float:
    """Log-probability of ``ids``, edited minus clean, the mean over tokens and prompts."""
    return float((edited - clean)[:, list(ids)].mean())


def push_to_kl(
    model: Model,
    prompts: Tokens,
    clean: Float[Tensor, "prompts d_vocab"],
    edit_at: Callable[[float], Edit],
    *,
    kl: float,
    tolerance: float = 0.01,
    start: float = 0.5,
) -> Pushed:
    """Find the strength at which ``edit_at(strength)`` costs ``kl`` nats, to a relative ``tolerance``.

    Brackets the root by doubling from ``start``, then bisects with the secant of log KL over log strength, which is
    nearly a straight line (KL grows like the square of a small strength).

    Raises:
        ConfigError: even a vector of 64 times the residual norm costs less.
    """

    def at(strength: float) -> Pushed:
        with steer(model, edit_at(strength)):
            logps = next_token_logps(model, prompts)
        return Pushed(strength, next_token_kl(clean, logps), logps)

    low, high = None, at(start)
    while high.kl < kl:
        if high.strength >= 64:
            raise ConfigError(f"steering reaches a KL of only {high.kl:.2f} nats, below the {kl} asked for; lower kl")
        low, high = high, at(high.strength * 2)
    while low is None:
        candidate = at(high.strength / 2)
        if candidate.kl < kl:
            low = candidate
        else:
            high = candidate
    best = min(low, high, key=lambda p: abs(p.kl - kl))
    for round_ in range(30):
        if abs(best.kl - kl) <= tolerance * kl:
            break
        # every third round halves the bracket, so that a curved stretch cannot stall the secant
        slope_share = math.log(kl / low.kl) / math.log(high.kl / low.kl) if low.kl > 0 and round_ % 3 else 0.5
        middle = at(math.exp(math.log(low.strength) + slope_share * math.log(high.strength / low.strength)))
        low, high = (middle, high) if middle.kl < kl else (low, middle)
        best = min(best, middle, key=lambda p: abs(p.kl - kl))
    return best
