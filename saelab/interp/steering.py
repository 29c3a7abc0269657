"""Steering: push, clamp or ablate features of an SAE while a model runs, and leave no trace afterwards.

Only the feature's own contribution changes; what the SAE does not explain (its error term) stays in the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import ConfigError, ShapeError
from saelab.models.load import Model
from saelab.sae.base import Feature

Mode = Literal["add", "clamp", "ablate"]

#: Strength of "add" where none is given: about 1 to 1.5 nats of next-token KL on the demo model.
DEFAULT_STRENGTH = 0.6
Delta = Callable[[Float[Tensor, "batch seq d_model"]], Float[Tensor, "batch seq d_model"]]


@dataclass(frozen=True)
class Edit:
    """What is added to the activations at one hook, as a function of the activations there."""

    hook_name: str
    delta: Delta
    width: int | None = None
    """Width of the activations that ``delta`` is for, where it is for one only."""


def add_direction(hook_name: str, direction: Float[Tensor, " d_model"], *, strength: float, mean_norm: float) -> Edit:
    """Add a vector along ``direction`` of norm ``strength * mean_norm``; a negative strength suppresses."""
    vector = strength * mean_norm * direction.detach() / direction.norm()
    return Edit(hook_name, lambda acts: vector.to(acts).expand_as(acts), width=len(vector))


def add_feature(feature: Feature, *, strength: float) -> Edit:
    """Add the feature's decoder direction; ``strength`` is the added norm as a share of the mean residual norm."""
    return add_direction(feature.hook_name, feature.direction, strength=strength, mean_norm=mean_norm(feature))


def clamp_feature(feature: Feature, *, value: float) -> Edit:
    """Set the feature's activation to ``value`` at every token: acts + (value - f(acts)) * W_dec[i]."""
    direction = feature.direction.detach()

    def delta(acts: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        return (value - feature.activation(acts.float())).unsqueeze(-1) * direction.to(acts.device)

    return Edit(feature.hook_name, delta, width=len(direction))


def ablate_feature(feature: Feature) -> Edit:
    """Take away what the feature contributes: acts - f(acts) * W_dec[i]."""
    return clamp_feature(feature, value=0.0)


def mean_norm(feature: Feature) -> float:
    """Mean norm of the activations at the feature's hook, as measured in training.

    Raises:
        ConfigError: the SAE does not record it.
    """
    norm = feature.sae.metadata.mean_norm
    if norm is None:
        raise ConfigError(
            f"the SAE of feature {feature.index} does not record the mean norm of its training activations, so a "
            "strength has no unit; use mode='clamp' with a value, or set sae.metadata.mean_norm"
        )
    return norm


@contextmanager
def steer(
    model: Model,
    target: Feature | Edit | Sequence[Feature | Edit],
    *,
    strength: float | None = None,
    mode: Mode = "add",
    value: float | None = None,
) -> Iterator[Model]:
    """Steer ``model`` inside the ``with`` block, in forward passes and in generation, at one hook or several.

    ``add`` pushes each feature by ``strength`` (default 0.6: norm of the added vector as a share of the mean residual
    norm), ``clamp`` sets its activation to ``value``, ``ablate`` removes it. BOS and padding are never edited. All
    deltas at a hook are computed from the same unedited activations, so the order of targets does not matter.

    Raises:
        ConfigError: the mode and its number do not go together, or the model has no such hook.
        ShapeError: the hook has another width than the SAE.
    """
    by_hook: dict[str, list[Delta]] = {}
    for edit in as_edits(target, strength=strength, mode=mode, value=value):
        found = model.hook_width(edit.hook_name)
        if edit.width not in (None, found):
            raise ShapeError(
                f"{edit.hook_name} of {model.name} has width {found}, but what is added there has width {edit.width}; "
                "give the model that the SAE was trained on"
            )
        by_hook.setdefault(edit.hook_name, []).append(edit.delta)
    with ExitStack() as stack:
        for hook_name, deltas in by_hook.items():
            stack.enter_context(model.edit(hook_name, _adding(deltas)))
        yield model


def as_edits(
    target: Feature | Edit | Sequence[Feature | Edit],
    *,
    strength: float | None = None,
    mode: Mode = "add",
    value: float | None = None,
) -> list[Edit]:
    """The edits that ``steer`` makes of its arguments; needs no model, so it finds mistakes early.

    Raises:
        ConfigError: the mode and its number do not go together.
    """
    targets = [target] if isinstance(target, (Feature, Edit)) else target
    for name, number in (("strength", strength), ("value", value)):
        if number is not None and not math.isfinite(number):
            raise ConfigError(f"{name} must be a finite number, got {number}; usual strengths are 0.3 to 1")
    plain = strength is None and mode == "add" and value is None
    if not plain and any(isinstance(t, Edit) for t in targets):
        raise ConfigError("an Edit says by itself what it adds; give strength, mode and value for features only")
    return [t if isinstance(t, Edit) else _edit(t, strength=strength, mode=mode, value=value) for t in targets]


def _edit(feature: Feature, *, strength: float | None, mode: Mode, value: float | None) -> Edit:
    if mode == "clamp":
        if value is None or strength is not None:
            raise ConfigError(
                "mode 'clamp' takes a value in units of the feature's activation and no strength; give value=..."
            )
        return clamp_feature(feature, value=value)
    if value is not None:
        raise ConfigError(
            f"a value belongs to mode 'clamp', but the mode is {mode!r}; give strength=... or mode='clamp'"
        )
    if mode == "ablate":
        if strength is not None:
            raise ConfigError("mode 'ablate' removes the feature altogether and takes no strength; leave it out")
        return ablate_feature(feature)
    if mode != "add":
        raise ConfigError(f"mode must be 'add', 'clamp' or 'ablate', got {mode!r}; choose one of them")
    return add_feature(feature, strength=DEFAULT_STRENGTH if strength is None else strength)


def _adding(deltas: Sequence[Delta]) -> Callable[[Tensor, Tensor], Tensor]:
    def edited(
        acts: Float[Tensor, "batch seq d_model"], keep: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_model"]:
        total = torch.stack([delta(acts).float() for delta in deltas]).sum(0)
        return (acts.float() + total).to(acts.dtype)

    return edited
