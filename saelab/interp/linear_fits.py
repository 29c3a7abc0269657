"""Lines between two classes: logistic regression, mean difference, and both on the k most telling columns.

Every fit is a direction and a bias in the units of the columns that it was given. What has to be chosen (the penalty)
is chosen on folds of the training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

#: Penalties among which a regression on many columns chooses (scikit-learn's C).
PENALTIES = (0.01, 0.1, 1.0)

#: Numbers of the rows to fit on, and of those held out; folds differ in length.
Fold = tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]

#: How good scores are, given the truth; higher is better.
Quality = Callable[[Float[np.ndarray, " _"], Bool[np.ndarray, " _"]], float]


class LinearFit(NamedTuple):
    """Positive where ``columns @ direction + bias > 0``."""

    direction: Float[np.ndarray, " columns"]
    bias: float

    def scores(self, columns: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, " rows"]:
        return columns @ self.direction + self.bias

    def says(self, columns: Float[np.ndarray, "rows columns"]) -> Bool[np.ndarray, " rows"]:
        return self.scores(columns) > 0


Fitter = Callable[[Float[np.ndarray, "_ columns"], Bool[np.ndarray, " _"]], LinearFit]


class Chosen(NamedTuple):
    """The best of several fits, and what it said of rows that it was not fitted on."""

    fit: LinearFit
    quality: float  # mean over the folds
    out_of_fold: Float[np.ndarray, " rows"]  # scores


def largest_differences(
    columns: Float[np.ndarray, "rows columns"], positive: Bool[np.ndarray, " rows"], k: int
) -> Int[np.ndarray, " k"]:
    """The k columns whose mean differs most between the positive and the other rows, the largest difference first."""
    difference = np.abs(columns[positive].mean(0) - columns[~positive].mean(0))
    return np.argsort(-difference, kind="stable")[:k]


def mean_difference_fit(columns: Float[np.ndarray, "rows columns"], positive: Bool[np.ndarray, " rows"]) -> LinearFit:
    """Along the difference of the two classes' means, zero halfway between them.

    Source: Marks and Tegmark 2023, arXiv 2310.06824, section 5 (without the covariance).
    """
    above, below = columns[positive].mean(0), columns[~positive].mean(0)
    direction = (above - below).astype(float)
    return LinearFit(direction, float(-direction @ (above + below) / 2))


def logistic_fit(
    columns: Float[np.ndarray, "rows columns"], positive: Bool[np.ndarray, " rows"], *, C: float = 1.0
) -> LinearFit:
    """Logistic regression on columns brought to variance 1, classes weighted equally, with a ridge penalty 1 / C.

    Raises:
        ValueError: only one class in ``positive``.
    """
    mean, spread = _mean_and_spread(columns)
    return _in_units(regression((columns - mean) / spread, positive, C=C), mean, spread)


def sparse_fit(columns: Float[np.ndarray, "rows columns"], positive: Bool[np.ndarray, " rows"], *, k: int) -> LinearFit:
    """`logistic_fit` on the k columns of the `largest_differences`; the direction is 0 elsewhere.

    Sources: Gurnee et al. 2023, arXiv 2305.01610, for k-sparse probes; Karvonen et al. 2025, arXiv 2503.09532,
    section 4.4, for the choice of the k.
    """
    chosen = largest_differences(columns, positive, k)
    fit = logistic_fit(columns[:, chosen], positive)
    direction = np.zeros(columns.shape[1])
    direction[chosen] = fit.direction
    return LinearFit(direction, fit.bias)


def best_logistic(
    columns: Float[np.ndarray, "rows columns"],
    positive: Bool[np.ndarray, " rows"],
    *,
    folds: Sequence[Fold],
    quality: Quality,
) -> Chosen:
    """`logistic_fit` with the penalty of `PENALTIES` that is best on the folds."""
    mean, spread = _mean_and_spread(columns)
    fitters = [partial(regression, C=C) for C in PENALTIES]
    best = best_of(fitters, (columns - mean) / spread, positive, folds=folds, quality=quality)
    return best._replace(fit=_in_units(best.fit, mean, spread))


def best_of(
    fitters: Sequence[Fitter],
    columns: Float[np.ndarray, "rows columns"],
    positive: Bool[np.ndarray, " rows"],
    *,
    folds: Sequence[Fold],
    quality: Quality,
) -> Chosen:
    """The first of the ``fitters`` whose mean quality over the held-out folds is highest, fitted on all rows."""
    tried = []
    for fitter in fitters:
        out_of_fold, qualities = np.zeros(len(columns)), []
        for fitted, held in folds:
            out_of_fold[held] = fitter(columns[fitted], positive[fitted]).scores(columns[held])
            qualities.append(quality(out_of_fold[held], positive[held]))
        tried.append((float(np.mean(qualities)), out_of_fold))
    best = max(range(len(fitters)), key=lambda i: tried[i][0])
    return Chosen(fitters[best](columns, positive), *tried[best])


def regression(
    scaled: Float[np.ndarray, "rows columns"], positive: Bool[np.ndarray, " rows"], *, C: float
) -> LinearFit:
    """Logistic regression on the columns as they are; see `logistic_fit`.

    Raises:
        ValueError: only one class in ``positive``, or coefficients that are not finite.
    """
    from sklearn.linear_model import LogisticRegression

    # OpenBLAS 0.3.31 reads past the end of 5 float32 columns and, by what lies there, may raise the flag of an invalid
    # operation; the product is right all the same (among signalling NaNs 80 of 300,000 products flagged, none wrong)
    with np.errstate(invalid="ignore"):
        fit = LogisticRegression(C=C, class_weight="balanced", max_iter=5000).fit(scaled, positive)
    if not (np.isfinite(fit.coef_).all() and np.isfinite(fit.intercept_).all()):
        raise ValueError("the logistic regression ended in coefficients that are not finite; look at the columns")
    return LinearFit(fit.coef_[0].astype(float), float(fit.intercept_[0]))


def _mean_and_spread(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    spread = columns.std(0)
    return columns.mean(0), np.where(spread > 0, spread, 1)


def _in_units(fit: LinearFit, mean: np.ndarray, spread: np.ndarray) -> LinearFit:
    """A fit on centred columns of variance 1, as one of the columns as they are."""
    direction = fit.direction / spread
    return LinearFit(direction, float(fit.bias - direction @ mean))
