"""Rules of the form "the position shows one of these items", and the explainer that finds the best set of them.

An item is a token, an n-gram, a word whatever its case, an ending, a shape. Within one family each position shows one
item, so the F1 of a set of items is a ratio of sums and the best set is found exactly (``label.best_sets``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.features import label
from saelab.features.explainers.interface import Explanation, Firings
from saelab.features.explainers.text import Text


class Family(NamedTuple):
    """Items, and which of them each position shows."""

    item: Int[np.ndarray, " positions"]
    meaning: Int[np.ndarray, "items width"]
    """What an item stands for, as numbers that ``describe`` and ``named`` read; -1 in front: for nothing, so no rule
    may hold it."""
    describe: Callable[[Sequence[Sequence[int]]], str]
    """Meanings of the items of a rule to its text."""
    named: Callable[[Sequence[Sequence[int]]], tuple[int, ...]]
    """The same to the tokens that the rule names."""


@dataclass(frozen=True, eq=False)
class ItemRule:
    """The feature fires where the position shows one of ``items``."""

    family: Family
    items: tuple[int, ...]

    @property
    def text(self) -> str:
        return self.family.describe(self.family.meaning[list(self.items)].tolist())

    @property
    def names(self) -> tuple[int, ...]:
        return self.family.named(self.family.meaning[list(self.items)].tolist())

    def fires(self) -> Bool[np.ndarray, " positions"]:
        chosen = np.zeros(len(self.family.meaning), bool)
        chosen[list(self.items)] = True
        return chosen[self.family.item]


class ItemExplainer:
    """The best set of items of the best family: a later, richer one must beat the earlier by ``label.MARGIN``."""

    def __init__(self, name: str, families: Sequence[Family], text: Text) -> None:
        self.name = name
        self.families = tuple(families)
        self._text = text

    def explain(self, firings: Firings) -> list[Explanation | None]:
        found = [best_items(family, firings, self._text) for family in self.families]
        f1 = np.stack([best.f1 for best in found], 1)
        choice = (f1 - label.MARGIN * np.arange(len(found))).argmax(1)
        return [found[family].rule(self.families[family], i) for i, family in enumerate(choice.tolist())]


class BestItems(NamedTuple):
    items: Int[np.ndarray, "features max_items"]
    """-1 where there are fewer."""
    f1: Float[np.ndarray, " features"]
    """On the fitting documents."""

    def rule(self, family: Family, i: int) -> ItemRule | None:
        items = self.items[i][self.items[i] >= 0]
        return ItemRule(family, tuple(items.tolist())) if len(items) else None


def best_items(family: Family, firings: Firings, text: Text) -> BestItems:
    """The set of items with the highest F1 on the fitting documents, for every feature of a block."""
    split = label.Halves(text.parts.fit, text.parts.choose | text.parts.score)
    counts = label.count_firings(firings.pairs, firings.clear, family, split)
    usable = family.meaning[counts.item, 0] >= 0
    scored = counts.scored().fit[usable]
    entries, f1 = label.best_sets(counts.feature[usable], counts.clear.fit[usable], scored, counts.total.fit)
    items = np.append(counts.item[usable], -1)[entries]
    return BestItems(items, f1)
