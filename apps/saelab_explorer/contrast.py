"""Two texts side by side: which features one of them has more of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

import saelab as sl

Side = Literal["first", "second", "both"]


class Contrast(NamedTuple):
    """A feature's largest activation on each of two texts."""

    feature: int
    first: float
    second: float
    difference: float
    """First minus second, as a share of the feature's largest activation here and in the index."""


def contrasted(
    first: sl.TextCodes, second: sl.TextCodes, index: sl.FeatureIndex, *, side: Side, n: int, max_density: float | None
) -> Sequence[Contrast]:
    """Features that fire more on one text, the largest difference first; for "both" those that fire most on both.

    ``max_density`` leaves out features that fire on a larger share of the indexed tokens.
    """
    tops = [_largest(codes, index.n_features) for codes in (first, second)]
    scale = np.maximum(np.maximum(index.column("max"), 1e-9), np.maximum(*tops))
    difference = (tops[0] - tops[1]) / scale
    score = {"first": difference, "second": -difference, "both": np.minimum(*tops) / scale}[side].copy()
    if max_density is not None:
        score[index.column("density") > max_density] = 0
    order = np.argsort(-score, kind="stable")[:n]
    return [Contrast(int(i), float(tops[0][i]), float(tops[1][i]), float(difference[i])) for i in order if score[i] > 0]


def _largest(codes: sl.TextCodes, n_features: int) -> Float[np.ndarray, " features"]:
    largest = np.zeros(n_features)
    np.maximum.at(largest, codes.features, codes.values)
    return largest
