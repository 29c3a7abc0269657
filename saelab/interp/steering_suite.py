"""Dose curves of features and of everything that they are to be compared with, piece by piece.

A piece is one curve; ``keep`` may hand back what an earlier, interrupted call had finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from saelab.activations.store import ActivationStore
from saelab.errors import ConfigError
from saelab.interp.dose import (
    Dose,
    DoseConfig,
    DoseCurve,
    Ground,
    Metric,
    dose_curve,
    instructed,
    token_logp,
    unsteered,
)
from saelab.interp.steering import Edit, add_direction, mean_norm
from saelab.interp.steering_baselines import Directions, directions, firings, instructions, random_directions
from saelab.interp.steering_record import Progress
from saelab.models.load import Model
from saelab.sae.base import SAE

#: ``keep(name, make)``: the JSON that is kept under the name, or that of ``make()``.
Keep = Callable[[str, Callable[[], dict[str, Any]]], dict[str, Any]]

FEATURE = "feature"
MEAN_DIFFERENCE = "mean difference"
PROBE = "probe"
RANDOM_DIRECTION = "random direction"
RANDOM_FEATURE = "random feature"


@dataclass(frozen=True, kw_only=True)
class SteeringSuiteConfig:
    dose: DoseConfig = field(default_factory=DoseConfig)
    n_directions: int = 4
    """Random directions."""
    n_twins: int = 1
    """Random features of equal density for each feature."""
    n_others: int = 2000
    """Tokens on which a feature does not fire, for the mean difference and the probe."""
    seed: int = 0
    """Seed of the random directions, features and tokens, and of the intervals."""

    def __post_init__(self) -> None:
        for name in ("n_directions", "n_twins", "n_others"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")


class Target(NamedTuple):
    """A feature to measure."""

    feature: int
    token_ids: tuple[int, ...]  # whose log-probability is the effect
    words: tuple[str, ...]  # the same as text, for the prompts
    clear: float  # activation above which the feature clearly fires
    twins: tuple[int, ...]  # random features of equal density


class Measured(NamedTuple):
    """All curves of one feature; the random ones are several to a name."""

    target: Target
    curves: dict[str, list[DoseCurve]]
    n_firing: int  # tokens behind the mean difference and the probe
    n_others: int


class SteeringSuite(NamedTuple):
    unsteered: Dose
    features: list[Measured]


def steering_suite(
    model: Model,
    sae: SAE,
    store: ActivationStore,
    targets: Sequence[Target],
    config: SteeringSuiteConfig,
    keep: Keep,
    *,
    progress: Progress | None = None,
) -> SteeringSuite:
    """Measure every feature of ``targets`` with all its baselines.

    Raises:
        ConfigError: no targets, a feature without tokens, or a direction that cannot reach a KL.
    """
    if not targets or not all(target.token_ids for target in targets):
        raise ConfigError(
            "every feature to measure needs tokens that it should make likelier; take features from the index"
        )
    bench = _Bench(Ground(model, config.dose), sae.metadata.hook_name, mean_norm(sae.feature(targets[0].feature)))
    metrics = {target.feature: token_logp(target.token_ids) for target in targets}
    n_prompts = len(instructions(targets[0].words))
    n_done, n_total = 0, config.n_directions + len(targets) * (3 + config.n_twins + n_prompts)

    def kept(name: str, make: Callable[[], DoseCurve]) -> DoseCurve:
        nonlocal n_done
        plain = keep(name.replace(": ", "-").replace(" ", "-"), lambda: to_json(make()))
        n_done += 1
        if progress:
            progress(n_done, n_total, "dose curves")
        return from_json(plain)

    found = keep("directions", partial(_found_directions, sae, store, targets, config, progress))
    nothing = Dose(**keep("unsteered", lambda: unsteered(bench.ground)._asdict()))
    everyone = {str(i): metric for i, metric in metrics.items()}
    random = [
        kept(f"{RANDOM_DIRECTION} {n}", partial(bench.along, RANDOM_DIRECTION, direction, everyone))
        for n, direction in enumerate(random_directions(config.n_directions, sae.d_out, seed=config.seed))
    ]
    features = []
    for target in targets:
        i, mine = target.feature, {str(target.feature): metrics[target.feature]}
        own = {
            FEATURE: sae.feature(i).direction,
            MEAN_DIFFERENCE: torch.tensor(found[str(i)]["mean_difference"]),
            PROBE: torch.tensor(found[str(i)]["probe"]),
        }
        curves = {name: [kept(f"{i} {name}", partial(bench.along, name, d, mine))] for name, d in own.items()}
        curves[RANDOM_DIRECTION] = random
        curves[RANDOM_FEATURE] = [
            kept(f"{i} twin {twin}", partial(bench.along, RANDOM_FEATURE, sae.feature(twin).direction, mine))
            for twin in target.twins
        ]
        for name, text in instructions(target.words).items():
            curves[name] = [kept(f"{i} {name}", partial(instructed, bench.ground, name, text, mine))]
        features.append(Measured(target, curves, found[str(i)]["n_firing"], found[str(i)]["n_others"]))
    return SteeringSuite(nothing, features)


class _Bench(NamedTuple):
    """What all directions are measured on."""

    ground: Ground
    hook_name: str
    mean_norm: float

    def along(self, name: str, direction: torch.Tensor, metrics: Mapping[str, Metric]) -> DoseCurve:
        def edit_at(strength: float) -> Edit:
            return add_direction(self.hook_name, direction, strength=strength, mean_norm=self.mean_norm)

        return dose_curve(self.ground, name, edit_at, metrics)


def to_json(curve: DoseCurve) -> dict[str, Any]:
    return {"name": curve.name, "doses": [dose._asdict() for dose in curve.doses]}


def from_json(plain: Mapping[str, Any]) -> DoseCurve:
    return DoseCurve(plain["name"], [Dose(**dose) for dose in plain["doses"]])


def _found_directions(
    sae: SAE,
    store: ActivationStore,
    targets: Sequence[Target],
    config: SteeringSuiteConfig,
    progress: Progress | None,
) -> dict[str, Any]:
    clear = {target.feature: target.clear for target in targets}
    found = firings(sae, store, clear, n_others=config.n_others, seed=config.seed, progress=progress)

    def plain(value: Directions) -> dict[str, Any]:
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in value._asdict().items()}

    return {str(i): plain(directions(found, i)) for i in clear}
