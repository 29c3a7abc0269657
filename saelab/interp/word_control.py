"""The control that a probe has to beat: what the words of a text give away without any model.

A probe that only notices a topic or a telling word is no better than a bag of words, and says so beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from saelab.interp.linear_fits import best_of, regression
from saelab.interp.probe_data import Halves
from saelab.interp.probe_scores import auroc_of, calibrated

#: Rows have length 1, so weights have to be larger than those of the probes.
_PENALTIES = (1.0, 10.0, 100.0)


class WordControl(NamedTuple):
    """Of the test texts, in their order."""

    scores: Float[np.ndarray, " test"]
    probabilities: Float[np.ndarray, " test"]


def word_control(texts: Sequence[str], positive: Bool[np.ndarray, " texts"], parts: Halves) -> WordControl:
    """Logistic regression on the weighted counts of words (tf-idf), trained, tuned and calibrated as probes are.

    Words are those of the training texts, without regard to case.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    counter = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True, dtype=np.float32)
    train = counter.fit_transform([texts[i] for i in parts.train]).toarray()
    test = counter.transform([texts[i] for i in parts.test]).toarray()
    fitters = [partial(regression, C=C) for C in _PENALTIES]
    chosen = best_of(fitters, train, positive[parts.train], folds=parts.folds, quality=auroc_of)
    scores = chosen.fit.scores(test)
    return WordControl(scores, calibrated(chosen.out_of_fold, positive[parts.train]).probabilities(scores))
