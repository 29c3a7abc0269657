"""Steering: push, clamp or ablate features of an SAE while a model runs, and leave no trace afterwards.

With u the direction at norm 1, m the mean norm of the activations in training, s the strength and f the feature:

    add          acts + s m u
    orthogonal   acts - (acts . u) u + s m u      the part along u is set, the rest stays; s = 0 removes it
    clamp        acts + (value - f(acts)) W_dec   only the feature's own contribution changes
    ablate       acts - f(acts) W_dec
    cap          acts - max(acts . u - s m, 0) u  the part along u is at most s m

What the SAE does not explain (its error term) stays in the activations, but for what of it lies along u.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import ConfigError, ShapeError
from saelab.interp.steering_conditions import Condition, Reading
from saelab.models.load import Model
from saelab.sae.base import Feature

Mode = Literal["add", "orthogonal", "clamp", "ablate", "cap"]

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
    when: Condition | None = None
    """The tokens at which it acts; all of them without a condition."""


def conditional(edit: Edit, condition: Condition) -> Edit:
    """``edit`` at the tokens where ``condition`` holds, and nothing elsewhere."""
    return replace(edit, when=condition)


def add_direction(hook_name: str, direction: Float[Tensor, " d_model"], *, strength: float, mean_norm: float) -> Edit:
    """Add a vector along ``direction`` of norm ``strength * mean_norm``; a negative strength suppresses."""
    vector = strength * mean_norm * _unit(direction)
    return Edit(hook_name, lambda acts: vector.to(acts).expand_as(acts), width=len(vector))


def set_projection(hook_name: str, direction: Float[Tensor, " d_model"], *, strength: float, mean_norm: float) -> Edit:
    """Keep what is orthogonal to ``direction``, and set the part along it to ``strength * mean_norm``.

    Unlike `add_direction`, a token that had much of the direction ends where one ends that had none. Strength 0 takes
    the direction out (directional ablation, Arditi et al. 2024, arXiv 2406.11717, section 2.4).
    """
    unit, wanted = _unit(direction), strength * mean_norm

    def delta(acts: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        along = unit.to(acts.device)
        return (wanted - acts.float() @ along).unsqueeze(-1) * along

    return Edit(hook_name, delta, width=len(unit))


def cap_projection(hook_name: str, direction: Float[Tensor, " d_model"], *, strength: float, mean_norm: float) -> Edit:
    """Let the part along ``direction`` be at most ``strength * mean_norm``; tokens below that are left alone.

    For a floor instead, cap the negated direction at the negated strength.
    """
    unit, most = _unit(direction), strength * mean_norm

    def delta(acts: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        along = unit.to(acts.device)
        return -(acts.float() @ along - most).clamp_min(0).unsqueeze(-1) * along

    return Edit(hook_name, delta, width=len(unit))


def _unit(direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    norm = direction.detach().float().norm()
    if not (norm > 0 and norm.isfinite()):
        raise ConfigError(f"a direction to steer along must have a length, but its norm is {float(norm)}; give another")
    return direction.detach().float() / norm


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
    norm), ``orthogonal`` sets the part of the activations along it to ``strength``, ``cap`` lets it be at most that,
    ``clamp`` sets the feature's activation to ``value``, ``ablate`` removes it. BOS and padding are never edited. All
    deltas and conditions at a hook are computed from the same unedited activations, so the order of targets does not
    matter; what happens at an earlier hook reaches a later one, as it does without steering.

    Raises:
        ConfigError: the mode and its number do not go together, the model has no such hook, or a condition is read
            further on in the model than where its edit acts.
        ShapeError: the hook has another width than the SAE.
    """
    readings: list[Reading] = []
    by_hook: dict[str, list[Delta]] = {}
    for edit in as_edits(target, strength=strength, mode=mode, value=value):
        _check_width(model, edit.hook_name, edit.width, "what is added")
        delta = edit.delta
        if edit.when is not None:
            _check_condition(model, edit, edit.when)
            readings.append(Reading(edit.when))
            delta = _where(readings[-1], delta)
        by_hook.setdefault(edit.hook_name, []).append(delta)
    with ExitStack() as stack:
        # those who read come first, so that at their hook they see what no edit has changed
        for reading in readings:
            stack.enter_context(model.edit(reading.condition.hook_name, reading.note))
        for hook_name, deltas in by_hook.items():
            stack.enter_context(model.edit(hook_name, _adding(deltas)))
        yield model


def _check_width(model: Model, hook_name: str, width: int | None, what: str) -> None:
    found = model.hook_width(hook_name)
    if width not in (None, found):
        raise ShapeError(
            f"{hook_name} of {model.name} has width {found}, but {what} there has width {width}; "
            "give the model that the SAE was trained on"
        )


def _check_condition(model: Model, edit: Edit, condition: Condition) -> None:
    _check_width(model, condition.hook_name, condition.width, "the condition")
    order = model.hook_names()
    if order.index(model.check_hook(condition.hook_name)) > order.index(model.check_hook(edit.hook_name)):
        raise ConfigError(
            f"the condition is read at {condition.hook_name}, which comes after {edit.hook_name}, where the edit acts; "
            "read it at the same hook or an earlier one"
        )


def _where(reading: Reading, delta: Delta) -> Delta:
    return lambda acts: torch.where(reading.mask(acts), delta(acts).float(), 0.0)


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
    if mode == "add":
        return add_feature(feature, strength=DEFAULT_STRENGTH if strength is None else strength)
    makers = {"orthogonal": set_projection, "cap": cap_projection}
    if mode not in makers:
        raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}; choose one of them")
    if strength is None:
        raise ConfigError(
            f"mode {mode!r} needs a strength, the projection as a share of the mean residual norm; 0 takes "
            "the direction out"
        )
    return makers[mode](feature.hook_name, feature.direction, strength=strength, mean_norm=mean_norm(feature))


def _adding(deltas: Sequence[Delta]) -> Callable[[Tensor, Tensor], Tensor]:
    def edited(
        acts: Float[Tensor, "batch seq d_model"], keep: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq d_model"]:
        total = torch.stack([delta(acts).float() for delta in deltas]).sum(0)
        return (acts.float() + total).to(acts.dtype)

    return edited
