"""Which features pass the filters of the table, and in which order."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

import saelab as sl
from saelab_explorer.address import DECADES, Filters

#: Search results are ranked; beyond so many nobody looks.
MOST_HITS = 500

_COLUMNS = {"f1": "label_f1", "precision": "label_precision", "recall": "label_recall"}


class Matches(NamedTuple):
    features: Int[np.ndarray, " matches"]
    """In the order to show them."""
    note: str
    """What was searched for, to follow the count of features."""


def matching(index: sl.FeatureIndex, filters: Filters) -> Matches:
    """Features that pass ``filters``: for a search the best match first, else those with the best label first.

    Raises:
        TextError: the search names a token that the vocabulary lacks, or holds no word.
    """
    wanted = filters.q.strip()
    candidates = _candidates(index, wanted) if wanted else np.arange(index.n_features)
    chosen = candidates[_passes(index, filters)[candidates]]
    if wanted and not filters.sort:
        return Matches(chosen, f" for {wanted}, best match first")
    return Matches(chosen[_order(index, chosen, filters.sort or "f1")], f" for {wanted}" if wanted else "")


def _candidates(index: sl.FeatureIndex, wanted: str) -> Int[np.ndarray, " candidates"]:
    """Features for a search: the one of that number, those of a quoted token, or those that describe the words."""
    if wanted.isascii() and wanted.isdigit() and len(wanted) < 10 and int(wanted) < index.n_features:
        return np.array([int(wanted)])
    quoted = re.fullmatch('"(.+)"', wanted, re.DOTALL)
    hits = index.search_token(quoted[1], n=MOST_HITS) if quoted else index.search(wanted, n=MOST_HITS)
    return np.array([hit.feature for hit in hits], dtype=np.int64)


def _passes(index: sl.FeatureIndex, filters: Filters) -> np.ndarray:
    density = index.column("density")
    keep = np.ones(index.n_features, bool)
    if filters.low > DECADES[0]:  # the lowest setting includes the silent features
        keep &= density >= 10**filters.low
    if filters.high < DECADES[-1]:
        keep &= density <= 10**filters.high
    if filters.kinds:
        keep &= np.isin(index.column("label_kind").astype(str), filters.kinds)
    return keep


def _order(index: sl.FeatureIndex, features: Int[np.ndarray, " matches"], sort: str) -> Int[np.ndarray, " matches"]:
    """Positions of ``features`` by a column, largest first unless ``sort`` begins with a minus; unknown ones last."""
    name, upwards = sort.removeprefix("-"), sort.startswith("-")
    if name == "feature":  # numbers are read upwards first
        return np.argsort(-features if upwards else features, kind="stable")
    values = index.column(_COLUMNS.get(name, name))[features].astype(float)
    return np.lexsort((features, np.where(np.isnan(values), np.inf, values if upwards else -values)))
