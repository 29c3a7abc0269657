"""How well explanations do over all live features, beside the control: medians with intervals, and distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from saelab.features.explain import Candidate, Explained
from saelab.stats import Interval, percentile_interval

MEASURES = ("precision", "recall", "f1")

#: Borders of the classes of features by their clear firings in the text.
FIRINGS = (1, 30, 100, 300, 1000)


class Comparison(NamedTuple):
    """The median over features of one measure, of both sides, with 95 % bootstrap intervals over features."""

    measure: str
    own: Interval
    control: Interval | None
    difference: Interval | None
    n: int
    n_control: int | None


def scorable(explained: Sequence[Explained], *, least: int = 1) -> list[Explained]:
    """The features that clearly fire in the scoring documents, at least ``least`` times."""
    return [feature for feature in explained if feature.n_clear[2] >= least]


def measured(candidate: Candidate | None, measure: str) -> float:
    """Precision, recall or F1 on the scoring documents; 0 without an explanation, and for one that matches nothing."""
    found = getattr(candidate.score, measure) if candidate is not None else None
    return 0.0 if found is None else float(found)


def values(features: Sequence[Explained], measure: str) -> Float[np.ndarray, " features"]:
    """The measure of each feature's best explanation."""
    return np.array([measured(feature.best, measure) for feature in features], float)


def of_kind(features: Sequence[Explained], kind: str, measure: str) -> Float[np.ndarray, " features"]:
    """The measure of each feature's explanation of one kind, whether it is the best or not."""
    found = ({c.kind: c for c in feature.candidates}.get(kind) for feature in features)
    return np.array([measured(candidate, measure) for candidate in found], float)


def compare(
    own: Sequence[Explained], control: Sequence[Explained] | None, *, draws: int, seed: int
) -> list[Comparison]:
    """Medians of both sides; empty without a scorable feature."""
    found = []
    for measure in MEASURES if own else ():
        ours = values(own, measure)
        theirs = values(control, measure) if control else None
        difference = None if theirs is None else median_difference(ours, theirs, draws=draws, seed=seed)
        other = None if theirs is None else median_interval(theirs, draws=draws, seed=seed + 1)
        n_control = None if theirs is None else len(theirs)
        own_median = median_interval(ours, draws=draws, seed=seed)
        found.append(Comparison(measure, own_median, other, difference, len(ours), n_control))
    return found


def median_interval(of: Float[np.ndarray, " n"], *, draws: int, seed: int) -> Interval:
    """The median with its percentile bootstrap interval."""
    return percentile_interval(float(np.median(of)), _resampled_medians(of, draws=draws, seed=seed))


def median_difference(
    first: Float[np.ndarray, " n"], second: Float[np.ndarray, " m"], *, draws: int, seed: int
) -> Interval:
    """Median of the first minus median of the second; both are resampled, independently of each other."""
    ours, theirs = (_resampled_medians(of, draws=draws, seed=s) for of, s in ((first, seed), (second, seed + 1)))
    return percentile_interval(float(np.median(first) - np.median(second)), ours - theirs)


def by_firings(explained: Sequence[Explained], measure: str) -> list[tuple[int, float | None]]:
    """For the features of each class of ``FIRINGS``: how many there are, and their median (None for none)."""
    total = np.array([sum(feature.n_clear) for feature in explained])
    of_class = np.searchsorted(FIRINGS, total, side="right") - 1
    groups = [[e for e, c in zip(explained, of_class, strict=True) if c == i] for i in range(len(FIRINGS))]
    return [(len(group), float(np.median(values(group, measure))) if group else None) for group in groups]


def _resampled_medians(of: Float[np.ndarray, " n"], *, draws: int, seed: int) -> Float[np.ndarray, " draws"]:
    rng = np.random.default_rng(seed)
    return np.array([np.median(of[rng.integers(0, len(of), len(of))]) for _ in range(draws)])
