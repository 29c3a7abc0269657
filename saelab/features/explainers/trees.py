"""Shallow decision trees over the context (scikit-learn), turned into readable rules.

A tree of depth ``DEPTH`` cuts the contexts into leaves. Splits are found on a sample of the fitting documents with both
sides weighing the same; which leaves say "fires" is then decided on all of them, as the set with the highest F1
(``label.best_sets``), so that the sample's balance does not decide where the threshold lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.features import label
from saelab.features.explainers.columns import SHORTLY, Column, Lately, TokenAt, fixed_columns, windows_before
from saelab.features.explainers.interface import Explanation, Fired, Firings
from saelab.features.explainers.items import BestItems, best_items
from saelab.features.explainers.ngrams import ngram_family
from saelab.features.explainers.text import Text

DEPTH = 4

#: Positions of each kind that a tree is grown on, at most: clear firings, chance positions, and positions that the
#: best token set would wrongly call firings.
N_CLEAR, N_CHANCE, N_HARD = 2000, 4000, 2000

MIN_LEAF = 5

#: Tokens of the sets whose single members a tree may ask for, and tokens asked for as "shortly before".
_N_SINGLE, _N_LATELY = 2, 4


class Split(NamedTuple):
    """An inner node: positions where ``column`` is at most ``threshold`` go to ``low``."""

    column: int
    threshold: float
    low: int
    high: int


class Grown(NamedTuple):
    """A tree as its nodes; a leaf is None."""

    nodes: tuple[Split | None, ...]


@dataclass(frozen=True, eq=False)
class TreeRule:
    """The feature fires where the tree ends in one of ``leaves``."""

    grown: Grown
    columns: tuple[Column, ...]
    leaves: tuple[int, ...]
    source: Text

    @property
    def text(self) -> str:
        paths = _paths(self.grown)
        vocabulary = self.source.vocabulary
        rules = []
        whole = _whole_branches(self.grown, self.leaves)
        for leaf in whole[:3]:
            asked = [
                self.columns[column].reads(vocabulary, above=above, threshold=threshold)
                for column, threshold, above in paths[leaf]
            ]
            rules.append(" and ".join(asked) or "everywhere")
        return "; or ".join(rules) + ("; or ..." if len(whole) > 3 else "")

    @property
    def names(self) -> tuple[int, ...]:
        """None: a tree speaks of contexts."""
        return ()

    def fires(self) -> Bool[np.ndarray, " positions"]:
        chosen = np.zeros(len(self.grown.nodes), bool)
        chosen[list(self.leaves)] = True
        return chosen[leaf_of(self.grown, self.columns, self.source)]


class TreeExplainer:
    """One tree a feature, over fixed columns and over the tokens that are typical of it."""

    name = "tree"

    def __init__(self, text: Text, *, seed: int) -> None:
        self._text = text
        self._seed = seed
        self._fixed: tuple[Column, ...] = tuple(fixed_columns(text))
        self._families = [ngram_family(text, (offset,)) for offset in (0, 1, 2)]
        self._fit = np.flatnonzero(text.parts.fit)

    @cached_property
    def _frequency(self) -> Float[np.ndarray, " d_vocab"]:
        """Of each token, the share of windows of ``SHORTLY`` tokens that hold it, were they drawn independently."""
        text = self._text
        n = np.bincount(text.tokens.reshape(-1)[text.parts.fit], minlength=len(text.vocabulary))
        return 1 - (1 - n / max(n.sum(), 1)) ** SHORTLY

    def explain(self, firings: Firings) -> list[Explanation | None]:
        sets = [best_items(family, firings, self._text) for family in self._families]
        return [self._of_feature(firings.of(i), sets, i, firings.first + i) for i in range(firings.n_features)]

    def _of_feature(self, fired: Fired, sets: list[BestItems], i: int, number: int) -> TreeRule | None:
        fit = self._text.parts.fit
        clear, weak = fired.clear[fit[fired.clear]], fired.weak[fit[fired.weak]]
        if len(clear) < 2 * MIN_LEAF:
            return None
        rng = np.random.default_rng((self._seed, number))
        columns = (*self._fixed, *self._typical(clear, sets, i))
        sample = self._sample(rng, clear, weak, sets[0], i)
        table = np.stack([column.at(self._text, sample) for column in columns], 1).astype(np.float32)
        grown = grow(table, np.isin(sample, clear))
        leaves = best_leaves(grown, leaf_of(grown, columns, self._text), clear, weak, fit)
        return TreeRule(grown, columns, leaves, self._text) if leaves else None

    def _typical(self, clear: Int[np.ndarray, " n"], sets: list[BestItems], i: int) -> list[Column]:
        """The best set of tokens at each place, its first members singly, and tokens typical of shortly before."""
        columns: list[Column] = []
        for offset, (family, best) in enumerate(zip(self._families, sets, strict=True)):
            rule = best.rule(family, i)
            if rule is not None:
                ids = tuple(family.meaning[list(rule.items), 0].tolist())
                singles = [(t,) for t in ids[:_N_SINGLE]] if len(ids) > 1 else []
                columns += [TokenAt(offset, chosen) for chosen in (ids, *singles)]
        shown = np.sort(windows_before(self._text, clear), axis=1)
        once = np.ones(shown.shape, bool)
        once[:, 1:] = shown[:, 1:] != shown[:, :-1]
        counts = np.bincount(shown[once & (shown >= 0)], minlength=len(self._text.vocabulary))
        surplus = counts / len(clear) - self._frequency
        best_tokens = np.argsort(-surplus, kind="stable")[:_N_LATELY]
        return columns + [Lately(int(t)) for t in best_tokens if surplus[t] > 0.05]

    def _sample(
        self,
        rng: np.random.Generator,
        clear: Int[np.ndarray, " clear"],
        weak: Int[np.ndarray, " weak"],
        tokens: BestItems,
        i: int,
    ) -> Int[np.ndarray, " sample"]:
        chance = self._fit[rng.integers(0, len(self._fit), N_CHANCE)]
        parts = [_some(rng, clear, N_CLEAR), chance]
        rule = tokens.rule(self._families[0], i)
        if rule is not None:
            parts.append(_some(rng, self._fit[rule.fires()[self._fit]], N_HARD))
        sample = np.unique(np.concatenate(parts))
        kept = ~np.isin(sample, weak)
        # chance may draw clear firings that the sample of them left out: they are what they are
        return sample[kept]


def grow(table: Float[np.ndarray, "sample columns"], fires: Bool[np.ndarray, " sample"]) -> Grown:
    """A tree of depth ``DEPTH`` that tells the two apart, both weighing the same."""
    from sklearn.tree import DecisionTreeClassifier

    weight = np.where(fires, 0.5 / max(fires.sum(), 1), 0.5 / max((~fires).sum(), 1))
    tree: Any = DecisionTreeClassifier(max_depth=DEPTH, min_samples_leaf=MIN_LEAF, random_state=0)
    inner = tree.fit(table, fires, sample_weight=weight).tree_
    columns = zip(inner.feature, inner.threshold, inner.children_left, inner.children_right, strict=True)
    return Grown(tuple(Split(int(c), float(t), int(a), int(b)) if a >= 0 else None for c, t, a, b in columns))


def leaf_of(grown: Grown, columns: tuple[Column, ...], text: Text) -> Int[np.ndarray, " positions"]:
    """The leaf in which each position of the text ends."""
    leaf = np.zeros(text.n_positions, np.int16)
    asked: dict[int, np.ndarray] = {}
    for number, node in enumerate(grown.nodes):  # parents stand before their children
        if node is None:
            continue
        if node.column not in asked:
            asked[node.column] = columns[node.column].values(text)
        high = asked[node.column] > node.threshold
        here = leaf == number
        leaf[here & ~high] = node.low
        leaf[here & high] = node.high
    return leaf


def best_leaves(
    grown: Grown,
    leaf: Int[np.ndarray, " positions"],
    clear: Int[np.ndarray, " clear"],
    weak: Int[np.ndarray, " weak"],
    fit: Bool[np.ndarray, " positions"],
) -> tuple[int, ...]:
    """The set of leaves with the highest F1 on the fitting documents."""
    n = len(grown.nodes)
    shown, met, unclear = (np.bincount(leaf[where], minlength=n).astype(np.int64) for where in (fit, clear, weak))
    entries, _ = label.best_sets(np.zeros(n, np.int64), met, shown - unclear, np.array([len(clear)]))
    return tuple(int(e) for e in entries[0] if e >= 0)


def _paths(grown: Grown) -> dict[int, list[tuple[int, float, bool]]]:
    """The conditions (column, threshold, above) on the way to each node; a column's later condition of a side replaces
    its earlier one, which it implies."""
    paths: dict[int, dict[tuple[int, bool], float]] = {0: {}}
    for number, node in enumerate(grown.nodes):
        if node is not None:
            paths[node.low] = {**paths[number], (node.column, False): node.threshold}
            paths[node.high] = {**paths[number], (node.column, True): node.threshold}
    return {
        number: [(column, threshold, above) for (column, above), threshold in path.items()]
        for number, path in paths.items()
    }


def _whole_branches(grown: Grown, leaves: tuple[int, ...]) -> list[int]:
    """The highest nodes below which every leaf is chosen: a split that decides nothing is none."""
    chosen = set(leaves)
    for number, node in reversed(list(enumerate(grown.nodes))):
        if node is not None and {node.low, node.high} <= chosen:
            chosen = chosen - {node.low, node.high} | {number}
    return sorted(chosen)


def _some(rng: np.random.Generator, positions: Int[np.ndarray, " n"], most: int) -> Int[np.ndarray, " kept"]:
    return positions if len(positions) <= most else rng.choice(positions, most, replace=False)
