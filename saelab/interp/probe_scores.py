"""How good a probe's scores are: ranking, recall at few false alarms, and whether its probabilities are true.

All are statistics of sums over groups of texts, so that the bootstrap of `saelab.stats` can resample whole groups.
A resample that happens to hold no text of a class tells nothing about ranking: it counts as 0.5 for the AUROC and as 0
for the recall.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.stats import Interval, Statistic, bootstrap, ratio

#: The share of other texts that may be called positive in `recall_at_1_percent`.
MAX_FALSE_ALARMS = 0.01

N_BINS = 10


class ProbeFigures(NamedTuple):
    """What is said of every probe and of every control."""

    auroc: Interval
    recall_at_1_percent: Interval
    ece: Interval
    brier: Interval


class Calibration(NamedTuple):
    """Probability of the positive class: sigmoid(slope * score + offset)."""

    slope: float
    offset: float

    def probabilities(self, scores: Float[np.ndarray, " texts"]) -> Float[np.ndarray, " texts"]:
        return 0.5 * (1 + np.tanh((self.slope * scores + self.offset) / 2))


def probe_figures(
    scores: Float[np.ndarray, " texts"],
    probabilities: Float[np.ndarray, " texts"],
    positive: Bool[np.ndarray, " texts"],
    groups: Int[np.ndarray, " texts"],
    *,
    draws: int,
    seed: int,
) -> ProbeFigures:
    """All figures with 95 % intervals over groups."""
    ranks = class_sums(scores, positive, groups)
    bins = calibration_sums(probabilities, positive, groups)
    squares = group_sums(np.stack([(probabilities - positive) ** 2, np.ones(len(positive))], 1), groups)

    def interval(statistic: Statistic, sums: Float[np.ndarray, "groups columns"]) -> Interval:
        return bootstrap(statistic, sums, draws=draws, seed=seed)

    return ProbeFigures(
        interval(auroc, ranks),
        interval(recall_at_1_percent, ranks),
        interval(expected_calibration_error, bins),
        interval(ratio, squares),
    )


def figure_values(
    scores: Float[np.ndarray, " texts"],
    probabilities: Float[np.ndarray, " texts"],
    positive: Bool[np.ndarray, " texts"],
) -> Float[np.ndarray, " figures"]:
    """The values of `probe_figures` in their order, without intervals."""
    alone = np.zeros(len(scores), np.int64)
    ranks = class_sums(scores, positive, alone)
    bins = calibration_sums(probabilities, positive, alone)
    brier = np.mean((probabilities - positive) ** 2)
    return np.array([auroc(ranks)[0], recall_at_1_percent(ranks)[0], expected_calibration_error(bins)[0], float(brier)])


def auroc_of(scores: Float[np.ndarray, " texts"], positive: Bool[np.ndarray, " texts"]) -> float:
    """`auroc` of single texts."""
    return float(auroc(class_sums(scores, positive, np.zeros(len(scores), np.int64)))[0])


def auroc_difference(
    first: Float[np.ndarray, " texts"],
    second: Float[np.ndarray, " texts"],
    positive: Bool[np.ndarray, " texts"],
    groups: Int[np.ndarray, " texts"],
    *,
    draws: int,
    seed: int,
) -> Interval:
    """AUROC of the first scores minus that of the second, of the same texts, which are resampled alike."""
    ours, theirs = (class_sums(scores, positive, groups) for scores in (first, second))
    n = ours.shape[1]

    def difference(sums: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
        return auroc(sums[:, :n]) - auroc(sums[:, n:])

    return bootstrap(difference, np.concatenate([ours, theirs], 1), draws=draws, seed=seed)


def class_sums(
    scores: Float[np.ndarray, " texts"], positive: Bool[np.ndarray, " texts"], groups: Int[np.ndarray, " texts"]
) -> Float[np.ndarray, "groups columns"]:
    """Texts of each group at each level of the score, from the lowest up: first the other class, then the positive.

    Equal scores share a level.
    """
    _, level = np.unique(scores, return_inverse=True)
    _, row = np.unique(groups, return_inverse=True)
    n_levels = int(level.max()) + 1
    sums = np.zeros((int(row.max()) + 1, 2 * n_levels))
    np.add.at(sums, (row, level + n_levels * positive), 1.0)
    return sums


def auroc(sums: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    """Chance that a positive text scores above another, ties counted half: 1 is perfect, 0.5 knows nothing.

    Source: Hanley and McNeil 1982, the Mann-Whitney statistic; of `class_sums`.
    """
    other, positive = np.split(sums, 2, axis=1)
    below = np.cumsum(other, axis=1) - other / 2
    pairs = other.sum(1) * positive.sum(1)
    return np.where(pairs > 0, (positive * below).sum(1) / np.maximum(pairs, 1), 0.5)


def recall_at_1_percent(sums: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    """Share of positive texts above the lowest threshold that at most 1 % of the others pass; of `class_sums`.

    With fewer than 100 others that means none of them.
    """
    other, positive = np.split(sums, 2, axis=1)
    alarms, found = (np.cumsum(part[:, ::-1], axis=1) for part in (other, positive))
    n_other, n_positive = alarms[:, -1:], found[:, -1:]
    allowed = (alarms <= MAX_FALSE_ALARMS * n_other + 1e-9) & (n_other > 0)
    return (np.where(allowed, found, 0) / np.maximum(n_positive, 1)).max(1)


def calibration_sums(
    probabilities: Float[np.ndarray, " texts"], positive: Bool[np.ndarray, " texts"], groups: Int[np.ndarray, " texts"]
) -> Float[np.ndarray, "groups columns"]:
    """Of each group in each of ten bins of equal width: probability minus outcome; and its number of texts."""
    bins = np.minimum((probabilities * N_BINS).astype(int), N_BINS - 1)
    columns = np.zeros((len(probabilities), N_BINS + 1))
    columns[np.arange(len(bins)), bins] = probabilities - positive
    columns[:, N_BINS] = 1
    return group_sums(columns, groups)


def expected_calibration_error(sums: Float[np.ndarray, "draws columns"]) -> Float[np.ndarray, " draws"]:
    """Mean distance of claimed probability from observed share, bins weighted by their texts: 0 is perfect.

    Above 0 by chance when there are few texts, also for true probabilities. Source: Guo et al. 2017, arXiv 1706.04599,
    eq. 3; of `calibration_sums`.
    """
    return np.abs(sums[:, :N_BINS]).sum(1) / sums[:, N_BINS]


def group_sums(
    columns: Float[np.ndarray, "texts columns"], groups: Int[np.ndarray, " texts"]
) -> Float[np.ndarray, "groups columns"]:
    """Sums of the rows of each group, in the order of the groups' numbers."""
    _, row = np.unique(groups, return_inverse=True)
    sums = np.zeros((int(row.max()) + 1, columns.shape[1]))
    np.add.at(sums, row, columns)
    return sums


def calibrated(scores: Float[np.ndarray, " texts"], positive: Bool[np.ndarray, " texts"]) -> Calibration:
    """Slope and offset that turn scores into probabilities, from texts on which the probe was not fitted.

    A logistic regression on the score alone, its targets drawn in from 0 and 1 by one text of each class.
    Source: Platt 1999, "Probabilistic outputs for support vector machines".
    """
    from sklearn.linear_model import LogisticRegression

    centre, spread = scores.mean(), scores.std()
    spread = spread if spread > 0 else 1.0
    n_positive, n_other = int(positive.sum()), int((~positive).sum())
    target = np.where(positive, (n_positive + 1) / (n_positive + 2), 1 / (n_other + 2))
    scaled = np.concatenate([scores, scores])[:, None]
    fit = LogisticRegression(C=1e6, max_iter=5000).fit(
        (scaled - centre) / spread,
        np.repeat([True, False], len(scores)),
        sample_weight=np.concatenate([target, 1 - target]),
    )
    slope = float(fit.coef_[0, 0] / spread)
    return Calibration(slope, float(fit.intercept_[0] - slope * centre))
