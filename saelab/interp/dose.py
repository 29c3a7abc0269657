"""Dose curves: what an intervention does, at several doses, beside what it costs.

Effect is the change of a metric of the next-token distribution after neutral prompts, such as the log-probability of
the tokens that trigger a feature. Cost is counted twice: by the next-token KL(clean || steered) on the same prompts,
and by how surprising the unsteered model finds the text that the steered one writes. Doses are given as KL, so that
curves of different interventions are matched by construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from saelab.errors import ConfigError
from saelab.interp.steering import Edit, steer
from saelab.interp.steering_record import NEUTRAL_PROMPTS, Progress, next_token_kls, next_token_logps, push_to_kl
from saelab.models.load import Model, Tokens
from saelab.models.tokens import right_padded

#: Doses are pushed to their KL up to this share of it.
_TOLERANCE = 0.02

#: Next-token log-probabilities [prompts, d_vocab] -> one number a prompt.
Metric = Callable[[Float[Tensor, "prompts d_vocab"]], Float[Tensor, " prompts"]]


@dataclass(frozen=True, kw_only=True)
class DoseConfig:
    """Where and how dose curves are measured."""

    kls: tuple[float, ...] = (0.25, 0.5, 1.0, 1.5)
    """Doses: next-token KL on the prompts, in nats, ascending."""
    prompts: tuple[str, ...] = NEUTRAL_PROMPTS
    """Prompts that have nothing to do with any feature."""
    max_new_tokens: int = 12
    """Tokens written after each prompt, for the perplexity."""
    temperature: float = 1.0
    """Of that writing; at 0 texts fall into loops, which have a low perplexity."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.kls or min(self.kls) <= 0 or list(self.kls) != sorted(set(self.kls)):
            raise ConfigError(f"kls must be KLs above 0 nats in ascending order, got {list(self.kls)}; try 0.5, 1, 1.5")
        if len(self.prompts) < 2 or self.max_new_tokens < 1:
            raise ConfigError("a dose curve needs at least two prompts and one token to write; raise max_new_tokens")


class Dose(NamedTuple):
    """What one dose did. Lists hold one number a prompt."""

    strength: float | None
    """Share of the mean residual norm; None for an instruction."""
    kls: list[float]
    """Next-token KL(clean || now), in nats."""
    effects: dict[str, list[float]]
    """By metric: its value now minus its value without intervention."""
    texts: list[str]
    """What the model wrote."""
    surprisals: list[float]
    """Nats that the unsteered model, which sees the prompt alone, needs for the written text."""
    n_tokens: list[int]
    """Tokens of the written text."""

    @property
    def kl(self) -> float:
        return float(np.mean(self.kls))

    @property
    def perplexity(self) -> float:
        """Of the written texts under the unsteered model: exp(nats / tokens) over all prompts; NaN for no text."""
        return math.exp(sum(self.surprisals) / sum(self.n_tokens)) if sum(self.n_tokens) else math.nan


class DoseCurve(NamedTuple):
    """One intervention at several doses, by ascending KL."""

    name: str
    doses: list[Dose]


@dataclass(frozen=True)
class Ground:
    """The neutral prompts and what the untouched model makes of them; to be made outside any edit."""

    model: Model
    config: DoseConfig

    @cached_property
    def tokens(self) -> Tokens:
        return self.model.to_tokens(list(self.config.prompts))

    @cached_property
    def clean(self) -> Float[Tensor, "prompts d_vocab"]:
        return next_token_logps(self.model, self.tokens)


def token_logp(ids: Sequence[int]) -> Metric:
    """The metric "mean log-probability of these tokens", in nats."""
    chosen = list(ids)
    return lambda logps: logps[:, chosen].mean(-1)


@torch.inference_mode()
def dose_curve(
    ground: Ground,
    name: str,
    edit_at: Callable[[float], Edit],
    metrics: Mapping[str, Metric],
    *,
    progress: Progress | None = None,
) -> DoseCurve:
    """Push ``edit_at(strength)`` to each KL of the config, and measure it there.

    Raises:
        ConfigError: a KL cannot be reached at any strength.
    """
    doses: list[Dose] = []
    start, config = 0.5, ground.config
    for number, kl in enumerate(config.kls, start=1):
        pushed = push_to_kl(
            ground.model, ground.tokens, ground.clean, edit_at, kl=kl, tolerance=_TOLERANCE, start=start
        )
        with steer(ground.model, edit_at(pushed.strength)):
            texts = _written(ground, ground.tokens)
        doses.append(_dose(ground, pushed.strength, pushed.logps, texts, metrics))
        following = config.kls[min(number, len(config.kls) - 1)]
        start = pushed.strength * math.sqrt(following / kl)  # KL grows about like the square of the strength
        if progress:
            progress(number, len(config.kls), name)
    return DoseCurve(name, doses)


@torch.inference_mode()
def instructed(ground: Ground, name: str, instruction: str, metrics: Mapping[str, Metric]) -> DoseCurve:
    """The single dose of an instruction in front of every prompt; the prompt itself stays the last thing read."""
    tokens = ground.model.to_tokens([instruction + prompt for prompt in ground.config.prompts])
    logps = next_token_logps(ground.model, tokens)
    return DoseCurve(name, [_dose(ground, None, logps, _written(ground, tokens), metrics)])


@torch.inference_mode()
def unsteered(ground: Ground) -> Dose:
    """The dose of nothing: what the perplexities of the others are to be compared with."""
    return _dose(ground, None, ground.clean, _written(ground, ground.tokens), {})


def effects_at(curve: DoseCurve, metric: str, kl: float) -> Float[np.ndarray, " prompts"] | None:
    """Each prompt's effect at a mean KL between the doses; None beyond the last one.

    Straight between doses over sqrt(KL), to which the strength is about proportional; no effect at no KL.
    """
    if kl > curve.doses[-1].kl * (1 + 1.5 * _TOLERANCE):
        return None
    costs = np.sqrt([0.0, *(dose.kl for dose in curve.doses)])
    effects = np.array([dose.effects[metric] for dose in curve.doses])
    effects = np.concatenate([np.zeros((1, effects.shape[1])), effects])
    return np.stack([np.interp(math.sqrt(kl), costs, column) for column in effects.T])


class Surprisals(NamedTuple):
    nats: list[float]
    n_tokens: list[int]


def surprisals(model: Model, prompts: Sequence[str], texts: Sequence[str]) -> Surprisals:
    """Nats that ``model`` needs for each text after its prompt, and the text's tokens; 0 and 0 for an empty one."""
    before = [model.to_tokens(prompt).ids[0].tolist() for prompt in prompts]
    after = [model.encode(text) for text in texts]
    ids, mask = right_padded([p + t for p, t in zip(before, after, strict=True)], pad_id=model.pad_id)
    logits = model.logits(ids, mask)[:, :-1].cpu()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    # the loss in column i is of token i + 1
    nats = [losses[i, len(p) - 1 : len(p) - 1 + len(t)] for i, (p, t) in enumerate(zip(before, after, strict=True))]
    return Surprisals([float(row.sum()) for row in nats], [len(row) for row in nats])


def _written(ground: Ground, tokens: Tokens) -> list[str]:
    config = ground.config
    return ground.model.generate_batch(
        tokens, max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=config.seed
    )


def _dose(
    ground: Ground,
    strength: float | None,
    logps: Float[Tensor, "prompts d_vocab"],
    texts: list[str],
    metrics: Mapping[str, Metric],
) -> Dose:
    effects = {name: (metric(logps) - metric(ground.clean)).tolist() for name, metric in metrics.items()}
    written = surprisals(ground.model, ground.config.prompts, texts)
    return Dose(strength, next_token_kls(ground.clean, logps).tolist(), effects, texts, written.nats, written.n_tokens)
