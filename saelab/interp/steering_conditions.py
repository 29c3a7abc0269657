"""When to steer: only at the tokens where another feature fires, or where a probe's score passes a threshold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.sae.base import Feature


@dataclass(frozen=True)
class Condition:
    """True at the tokens whose ``score(acts)``, read at ``hook_name``, is above the threshold."""

    hook_name: str
    score: Callable[[Float[Tensor, "batch seq d_model"]], Float[Tensor, "batch seq"]]
    above: float = 0.0
    width: int | None = None
    """Width of the activations that ``score`` is for, where it is for one only."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.above):
            raise ConfigError(f"a condition's threshold must be a finite number, got {self.above}; 0 means any firing")

    def holds(self, acts: Float[Tensor, "batch seq d_model"]) -> Bool[Tensor, "batch seq"]:
        """Token by token, for activations at ``hook_name``."""
        return self.score(acts.float()) > self.above


def feature_fires(feature: Feature, *, above: float = 0.0) -> Condition:
    """The tokens on which ``feature`` is active at more than ``above``, in units of its activation."""
    return Condition(feature.hook_name, feature.activation, above, width=len(feature.direction))


def direction_exceeds(hook_name: str, direction: Float[Tensor, " d_model"], *, above: float) -> Condition:
    """The tokens with ``acts @ direction > above``: the direction as it is, not brought to norm 1.

    For a linear probe with weights ``w`` and bias ``b`` that means "yes" above a logit of ``t``, give ``w`` and
    ``above=t - b``.
    """
    direction = direction.detach().float()

    def score(acts: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq"]:
        return acts @ direction.to(acts.device)

    return Condition(hook_name, score, above, width=len(direction))


class Reading:
    """What a condition read in the present forward pass, for an edit further on in the model."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self.latest: Bool[Tensor, "batch seq"] | None = None

    def note(self, acts: Tensor, keep: Tensor) -> Tensor:
        """An edit that changes nothing."""
        self.latest = self.condition.holds(acts)
        return acts

    def mask(self, acts: Float[Tensor, "batch seq d_model"]) -> Bool[Tensor, "batch seq 1"]:
        """The tokens where the condition held."""
        assert self.latest is not None, "steer lets only hooks be read that come before the edit"
        return self.latest.to(acts.device).unsqueeze(-1)
