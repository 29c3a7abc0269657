"""Who wins at equal KL? Dose curves of a feature and its baselines, turned into comparisons and a verdict.

Directions are compared at a stated KL; an instruction has no strength, so there the feature is read off its dose curve
at the KL that the instruction happens to cost. Differences are paired by prompt, and the intervals resample prompts;
over features they resample features. Each feature meets several baselines, so of many intervals one in twenty is
expected to miss by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from saelab.interp.dose import Dose, DoseCurve, effects_at
from saelab.interp.steering_suite import FEATURE, Measured
from saelab.stats import Interval, bootstrap, interval_of_mean, ratio

#: n features all on one side of zero have a chance of 2 / 2^n where there is no difference: 3 % for 6.
_FEWEST = 6


class Comparison(NamedTuple):
    """A feature and a baseline at the same KL; effects are means over prompts, in nats."""

    baseline: str
    kl: float
    feature_effect: float | None  # None where the feature's curve does not reach that KL
    baseline_effect: float | None  # likewise
    difference: Interval | None  # feature minus baseline

    @property
    def verdict(self) -> str:
        """``feature`` or ``baseline``, whichever is ahead with its whole interval, ``tie`` or ``not comparable``."""
        if self.difference is None:
            return "not comparable"
        return "feature" if self.difference.low > 0 else "baseline" if self.difference.high < 0 else "tie"


class Point(NamedTuple):
    """A dose for the table and the picture: means over prompts and, for the random ones, over directions."""

    method: str
    strength: float | None
    kl: float
    effect: Interval
    perplexity: Interval


class FeatureVerdict(NamedTuple):
    feature: int
    comparisons: list[Comparison]
    points: list[Point]

    @property
    def beaten_by(self) -> list[Comparison]:
        """The baselines that are ahead of the feature, the one furthest ahead first."""
        ahead = [c for c in self.comparisons if c.verdict == "baseline"]
        return sorted(ahead, key=lambda c: c.difference.value if c.difference else 0.0)

    @property
    def winner(self) -> str:
        """The best baseline that beats the feature; ``feature`` if all are beaten; else ``none``."""
        if self.beaten_by:
            return self.beaten_by[0].baseline
        comparable = [c for c in self.comparisons if c.verdict != "not comparable"]
        return FEATURE if comparable and all(c.verdict == "feature" for c in comparable) else "none"

    def sentence(self) -> str:
        """Plainly who wins."""
        parts = []
        for verdict, words in (("baseline", "loses to"), ("tie", "is not told apart from"), ("feature", "beats")):
            named = [_named(c) for c in self.comparisons if c.verdict == verdict]
            if named:
                parts.append(f"{words} {', '.join(named)}")
        out_of_reach = [c.baseline for c in self.comparisons if c.verdict == "not comparable"]
        if out_of_reach:
            parts.append(f"was not pushed as far as {', '.join(out_of_reach)}")
        heads = {FEATURE: "the feature wins", "none": "no clear winner"}
        return f"{heads.get(self.winner, f'{self.winner} wins')}: the feature " + "; ".join(parts)


class Overall(NamedTuple):
    """A baseline over all features."""

    baseline: str
    difference: Interval  # feature minus baseline, the interval over features (of one feature: over prompts)
    wins: int  # of the feature
    ties: int
    losses: int
    kl: float  # mean over features


def verdict(measured: Measured, *, kl: float, seed: int = 0) -> FeatureVerdict:
    """All comparisons of one feature: directions at ``kl``, instructions at their own."""
    metric, curves = str(measured.target.feature), measured.curves
    feature = curves[FEATURE][0]
    comparisons = []
    for name, group in curves.items():
        if name == FEATURE:
            continue
        cost = kl if group[0].doses[0].strength is not None else group[0].doses[0].kl
        comparisons.append(_compared(feature, name, group, metric, cost, seed=seed))
    points = [point for name, group in curves.items() for point in _points(name, group, metric, seed=seed)]
    return FeatureVerdict(measured.target.feature, comparisons, points)


def overall(verdicts: Sequence[FeatureVerdict], *, seed: int = 0) -> list[Overall]:
    """Each baseline's mean difference over the features that could be compared with it, worst for the features first.

    Of a single feature there is nothing to resample, so its own interval over prompts stands there. A baseline that
    could be compared with none is left out.
    """
    rows = []
    for name in dict.fromkeys(c.baseline for v in verdicts for c in v.comparisons):
        mine = [c for v in verdicts for c in v.comparisons if c.baseline == name and c.difference is not None]
        if not mine:
            continue
        found = [c.difference for c in mine if c.difference is not None]
        values = np.array([difference.value for difference in found])
        difference = found[0] if len(found) == 1 else interval_of_mean(values, seed=seed)
        wins, ties, losses = (sum(c.verdict == kind for c in mine) for kind in ("feature", "tie", "baseline"))
        kl = float(np.mean([c.kl for c in mine]))
        rows.append(Overall(name, difference, wins, ties, losses, kl))
    return sorted(rows, key=lambda row: row.difference.value)


def overall_sentence(rows: Sequence[Overall]) -> str:
    """Plainly who wins over all features.

    Two to five features are only counted: the interval of so few is from the least to the greatest of them, and all on
    one side of zero would happen by chance in more than one of twenty cases.
    """
    if 1 < min(row.wins + row.ties + row.losses for row in rows) < _FEWEST:
        counts = "; ".join(
            f"they win {row.wins}, tie {row.ties} and lose {row.losses} against {row.baseline}" for row in rows
        )
        return f"these are fewer features than the {_FEWEST} that a verdict takes: {counts}."
    ahead = [row.baseline for row in rows if row.difference.high < 0]
    behind = [row.baseline for row in rows if row.difference.low > 0]
    tied = [row.baseline for row in rows if row.baseline not in (*ahead, *behind)]
    parts = []
    if ahead:
        parts.append(f"{', '.join(ahead)} {'wins' if len(ahead) == 1 else 'win'} against the features at equal KL")
    if tied:
        parts.append(f"{', '.join(tied)} and the features are not told apart")
    if behind:
        parts.append(f"the features win against {', '.join(behind)}")
    return "; ".join(parts) + "."


def _compared(
    feature: DoseCurve, name: str, group: Sequence[DoseCurve], metric: str, kl: float, *, seed: int
) -> Comparison:
    if group[0].doses[0].strength is None:
        reached = [np.array(curve.doses[0].effects[metric]) for curve in group]
    else:
        reached = [effects for curve in group if (effects := effects_at(curve, metric, kl)) is not None]
    theirs = np.mean(reached, axis=0) if reached else None
    ours = effects_at(feature, metric, kl)
    difference = None if ours is None or theirs is None else interval_of_mean(ours - theirs, seed=seed)
    return Comparison(name, kl, _mean(ours), _mean(theirs), difference)


def _mean(effects: Float[np.ndarray, " prompts"] | None) -> float | None:
    return None if effects is None else float(effects.mean())


def _points(name: str, group: Sequence[DoseCurve], metric: str, *, seed: int) -> list[Point]:
    points = []
    for doses in zip(*(curve.doses for curve in group), strict=True):
        effects = np.mean([dose.effects[metric] for dose in doses], axis=0)
        strengths = [dose.strength for dose in doses if dose.strength is not None]
        points.append(
            Point(
                name,
                float(np.mean(strengths)) if strengths else None,
                float(np.mean([dose.kl for dose in doses])),
                interval_of_mean(effects, seed=seed),
                perplexity(doses, seed=seed),
            )
        )
    return points


def perplexity(doses: Sequence[Dose], *, seed: int = 0) -> Interval:
    """Of all texts of some doses under the unsteered model, with an interval over prompts."""
    nats, tokens = (np.sum([getattr(d, name) for d in doses], axis=0) for name in ("surprisals", "n_tokens"))
    return bootstrap(_exp_ratio, np.stack([nats, tokens], 1).astype(float), seed=seed)


def _exp_ratio(sums: Float[np.ndarray, "draws 2"]) -> Float[np.ndarray, " draws"]:
    return np.exp(ratio(sums))


def _named(comparison: Comparison) -> str:
    assert comparison.difference is not None, "only comparable baselines have a verdict"
    value, low, high = comparison.difference
    return f"{comparison.baseline} ({value:+.2f} nats, {low:+.2f} to {high:+.2f}, at a KL of {comparison.kl:.2f})"
