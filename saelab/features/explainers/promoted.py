"""The logit table as an explanation: the feature fires on, or right before, the tokens that its direction promotes.

Which tokens these are comes from the weights alone (``logits.logit_table``); the text chooses only how many of them,
and whether the feature fires on them or before them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from saelab.features import label
from saelab.features.explainers.interface import Explanation, Firings
from saelab.features.explainers.items import Family, ItemRule
from saelab.features.explainers.ngrams import ngram_family
from saelab.features.explainers.text import Text


class PromotedExplainer:
    """The best beginning of each feature's list of promoted tokens."""

    name = "logit table"

    def __init__(self, promoted: Int[np.ndarray, "features n"], text: Text) -> None:
        self._promoted = promoted
        self._text = text
        self._families = [ngram_family(text, (offset,)) for offset in (-1, 0)]

    def explain(self, firings: Firings) -> list[Explanation | None]:
        promoted = self._promoted[firings.first : firings.first + firings.n_features]
        found = [best_beginnings(family, promoted, firings, self._text) for family in self._families]
        rules: list[Explanation | None] = []
        for i in range(firings.n_features):
            family, best = max(zip(self._families, found, strict=True), key=lambda pair: pair[1].f1[i])
            rules.append(best.rule(family, i))
        return rules


class Beginnings(NamedTuple):
    """How far down its list each feature's best rule goes."""

    f1: Float[np.ndarray, " features"]
    """On the fitting documents."""
    items: Int[np.ndarray, "features n"]
    """The item of each promoted token in the family, -1 for those that the text does not show."""
    length: Int[np.ndarray, " features"]

    def rule(self, family: Family, i: int) -> ItemRule | None:
        items = self.items[i, : self.length[i]]
        return ItemRule(family, tuple(items[items >= 0].tolist())) if self.f1[i] > 0 else None


def best_beginnings(
    family: Family, promoted: Int[np.ndarray, "features n"], firings: Firings, text: Text
) -> Beginnings:
    """The beginning of each list with the highest F1 on the fitting documents; of equals the shortest."""
    split = label.Halves(text.parts.fit, text.parts.choose | text.parts.score)
    counts = label.count_firings(firings.pairs, firings.clear, family, split)
    item_of = np.full(len(text.vocabulary) + 1, -1, np.int64)
    item_of[family.meaning[:, 0]] = np.arange(len(family.meaning))
    item_of[-1] = -1
    items = item_of[promoted]
    n_items = len(family.meaning)
    keys = counts.feature * n_items + counts.item
    wanted = np.arange(len(promoted))[:, None] * n_items + items
    at = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    met = (items >= 0) & (keys[at] == wanted) if len(keys) else np.zeros_like(items, bool)
    # a promoted token that the feature never clearly meets counts with all its positions, weak firings too
    shown = np.where(items >= 0, counts.shown.fit[items], 0)
    clear = np.where(met, counts.clear.fit[at], 0) if len(keys) else np.zeros_like(items)
    scored = np.where(met, counts.scored().fit[at], shown) if len(keys) else shown
    f1 = 2 * clear.cumsum(1) / np.maximum(counts.total.fit[:, None] + scored.cumsum(1), 1)
    best = f1.argmax(1)
    return Beginnings(f1[np.arange(len(f1)), best], items, best + 1)
