"""Labels without a judge: the rule on tokens that best predicts when a feature clearly fires, scored on other documents.

A feature fires clearly where it reaches a quarter of its maximum: the many weak activations below follow no rule that a
person would give, and with them the recall of the best rules is a third instead of a half. Three families of rules compete: "the token is one of these", "the token before is one of these", "token and token
before are one of these pairs". A rule is the set of at most ``MAX_ITEMS`` items with the highest F1 on half of the
documents (chosen by hash); precision and recall are those on the other half, which chose nothing.

    precision = matched positions on which the feature clearly fires / matched positions
    recall    = matched positions on which the feature clearly fires / positions on which it clearly fires

Where no rule describes a feature, its effect on the logits may; else the label says that nothing does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int

from saelab.features.codes import Pairs
from saelab.features.examples import hash64
from saelab.features.records import Label, LabelKind, RuleItem
from saelab.features.segments import positive_bits, rank_within

#: Share of its maximum from which on a feature fires clearly.
CLEAR = 0.25

MAX_ITEMS = 8

#: An item must explain this share of the feature's firings: what explains less lengthens the label and says little.
MIN_SHARE = 0.02

#: A rule may give up this share of its F1 for having fewer items.
TRIM = 0.02

#: F1 on the fitting documents below which a rule is no description.
MIN_F1 = 0.3

#: A rule on the token before, or on pairs, must beat a simpler one by this much F1, because it has more to choose from.
MARGIN = 0.02

#: Matched positions needed in each half; a rule with fewer is "weak": 5 of 5 means little.
MIN_SUPPORT = 10

#: Held-out F1 below which a rule is "weak" as well: it described the fitting documents, but not the others.
MIN_HELD_OUT_F1 = 0.15


class View(NamedTuple):
    """One family of rules: which item each position shows, and what an item is."""

    kind: LabelKind
    item: Int[np.ndarray, " positions"]
    meaning: Int[np.ndarray, "items 2"]
    """Token before and token of each item; -1 where the item says nothing of it."""


class Counts(NamedTuple):
    """How features and the items of one view meet: entries sorted by feature and item, and the totals."""

    feature: Int[np.ndarray, " entries"]
    """Counted from the block's first."""
    item: Int[np.ndarray, " entries"]
    fit: Int[np.ndarray, " entries"]
    """Firings of the feature on the item in the fitting documents; ``held_out`` in the others."""
    held_out: Int[np.ndarray, " entries"]
    shown_fit: Int[np.ndarray, " items"]
    """Positions that show the item in the fitting documents; ``shown_held_out`` in the others."""
    shown_held_out: Int[np.ndarray, " items"]
    fired_fit: Int[np.ndarray, " features"]
    """Firings in the fitting documents; ``fired_held_out`` in the others."""
    fired_held_out: Int[np.ndarray, " features"]


class Rules(NamedTuple):
    """The best rule of each feature within one family, and how it did."""

    items: Int[np.ndarray, "features 8"]
    """-1 where there are fewer."""
    f1: Float[np.ndarray, " features"]
    """On the fitting documents."""
    n_fit: Int[np.ndarray, " features"]
    """Matched positions in the fitting documents."""
    n_held_out: Int[np.ndarray, " features"]
    """Matched positions in the others."""
    n_both: Int[np.ndarray, " features"]
    """Those of ``n_held_out`` on which the feature fires."""


class Halves(NamedTuple):
    """Positions that choose the rules, and those that score them; BOS is in neither."""

    fit: Bool[np.ndarray, " positions"]
    held_out: Bool[np.ndarray, " positions"]


def halves(docs: Int[np.ndarray, "rows context"], *, seed: int) -> Halves:
    """Split positions by a hash of their document's number."""
    fit = hash64(seed, np.zeros(docs.size, np.int64), docs.reshape(-1).astype(np.int64)) < np.uint64(2**63)
    counted = np.ones(docs.shape, bool)
    counted[:, 0] = False
    return Halves(fit & counted.reshape(-1), ~fit & counted.reshape(-1))


def views(tokens: Int[np.ndarray, "rows context"], d_vocab: int) -> tuple[View, View, View]:
    """The three families over the indexed text; the first position (BOS) of a row is never matched."""
    token = tokens.reshape(-1).astype(np.int64)
    before = np.roll(tokens, 1, axis=1).reshape(-1).astype(np.int64)
    ids, nothing = np.arange(d_vocab), np.full(d_vocab, -1)
    pairs, pair = np.unique(before * d_vocab + token, return_inverse=True)
    return (
        View("token", token, np.column_stack([nothing, ids])),
        View("previous", before, np.column_stack([ids, nothing])),
        View("bigram", pair, np.column_stack([pairs // d_vocab, pairs % d_vocab])),
    )


def count_firings(pairs: Pairs, view: View, split: Halves) -> Counts:
    """How often each feature of a block fires on each item, in both halves."""
    n_positions, n_items = len(view.item), len(view.meaning)
    counted = split.fit | split.held_out
    shape = (pairs.n_features, n_positions)
    fires = scipy.sparse.csr_array((np.ones(len(pairs.positions), np.int64), pairs.positions, pairs.offsets), shape=shape)
    # both halves in one product: a fitting position adds 1, another one 2^32
    weights = np.where(split.fit, 1, 1 << 32)[counted]
    offsets = np.concatenate([[0], np.cumsum(counted)])
    shows = scipy.sparse.csr_array((weights, view.item[counted], offsets), shape=(n_positions, n_items))
    both = fires @ shows
    both.sort_indices()
    fit, held_out = both.data & 0xFFFFFFFF, both.data >> 32
    feature = np.repeat(np.arange(pairs.n_features), np.diff(both.indptr))
    return Counts(
        feature=feature,
        item=both.indices.astype(np.int64),
        fit=fit,
        held_out=held_out,
        shown_fit=np.bincount(view.item[split.fit], minlength=n_items),
        shown_held_out=np.bincount(view.item[split.held_out], minlength=n_items),
        fired_fit=np.bincount(feature, weights=fit, minlength=pairs.n_features).astype(np.int64),
        fired_held_out=np.bincount(feature, weights=held_out, minlength=pairs.n_features).astype(np.int64),
    )


def best_rules(counts: Counts) -> Rules:
    """The rule of highest F1 on the fitting documents for every feature of a block, with its counts on the others."""
    items, f1 = best_sets(counts.feature, counts.item, counts.fit, counts.shown_fit, counts.fired_fit)
    feature, slot = np.nonzero(items >= 0)
    chosen = items[feature, slot]
    # the counts are sorted by feature and item, so a search finds each chosen pair
    n_items = len(counts.shown_fit)
    at = np.searchsorted(counts.feature * n_items + counts.item, feature * n_items + chosen)

    def total(values: Int[np.ndarray, " chosen"]) -> Int[np.ndarray, " features"]:
        return np.bincount(feature, weights=values, minlength=len(items)).astype(np.int64)

    return Rules(
        items=items,
        f1=f1,
        n_fit=total(counts.shown_fit[chosen]),
        n_held_out=total(counts.shown_held_out[chosen]),
        n_both=total(counts.held_out[at]),
    )


def best_sets(
    feature: Int[np.ndarray, " entries"],
    item: Int[np.ndarray, " entries"],
    both: Int[np.ndarray, " entries"],
    n_shown: Int[np.ndarray, " items"],
    fired: Int[np.ndarray, " features"],
) -> tuple[Int[np.ndarray, "features 8"], Float[np.ndarray, " features"]]:
    """For every feature the set of at most ``MAX_ITEMS`` items with the highest F1, most helpful first, and that F1.

    ``both[e]`` positions show ``item[e]`` and make ``feature[e]`` fire. Items are disjoint, so F1 of a set is a ratio of sums, 2 sum(both) / (fired + sum(shown)). Dinkelbach's method
    (1967) maximises such a ratio exactly: with ratio r at hand, the best set for "numerator - r * denominator" is the
    items of largest positive 2 both - r shown; its ratio is the next r, until nothing changes.
    """
    n_features = len(fired)
    kept = both >= np.maximum(2, MIN_SHARE * fired[feature])
    feature, item, both = feature[kept], item[kept], both[kept]
    shown = n_shown[item]
    ratio = np.zeros(n_features)
    np.maximum.at(ratio, feature, 2 * both / np.maximum(fired[feature] + shown, 1))
    while True:
        gain = 2 * both - ratio[feature] * shown
        order = np.lexsort((item, -gain, feature))
        order = order[(gain[order] > 0) & (rank_within(feature[order]) < MAX_ITEMS)]
        numerator = np.bincount(feature[order], weights=2 * both[order], minlength=n_features)
        denominator = fired + np.bincount(feature[order], weights=shown[order], minlength=n_features)
        improved = numerator / np.maximum(denominator, 1)
        if (improved <= ratio + 1e-12).all():
            break
        ratio = np.maximum(ratio, improved)
    items = np.full((n_features, MAX_ITEMS), -1, np.int64)
    both_of, shown_of = np.zeros((2, n_features, MAX_ITEMS), np.int64)
    rank = rank_within(feature[order])
    for table, values in ((items, item), (both_of, both), (shown_of, shown)):
        table[feature[order], rank] = values[order]
    return _trimmed(items, both_of, shown_of, fired)


def specific_items(counts: Counts, *, n: int) -> tuple[Int[np.ndarray, "features n"], Int[np.ndarray, "features n"]]:
    """The ``n`` items each feature is most specific to (by F1 over all documents), and its firings on each; -1 and 0
    where there are fewer."""
    feature, both = counts.feature, counts.fit + counts.held_out
    fired = counts.fired_fit + counts.fired_held_out
    f1 = 2 * both / (fired[feature] + (counts.shown_fit + counts.shown_held_out)[counts.item])
    # the sort is stable and items ascend, so equals keep the lower item first
    order = np.argsort(feature << 32 | 0xFFFFFFFF - positive_bits(f1), kind="stable")
    rank = rank_within(feature)
    order, rank = order[rank < n], rank[rank < n]
    items, n_both = np.full((len(fired), n), -1, np.int64), np.zeros((len(fired), n), np.int64)
    items[feature[order], rank], n_both[feature[order], rank] = counts.item[order], both[order]
    return items, n_both


def write_labels(
    families: Sequence[tuple[View, Rules]],
    n_clear_held_out: Int[np.ndarray, " features"],
    n_fired: Int[np.ndarray, " features"],
    promotes: Sequence[str],
    vocabulary: Sequence[str],
) -> list[Label]:
    """One label a feature: the best family of rules (the simpler one within ``MARGIN``), else the tokens that it clearly
    promotes (``promotes``, "" for none), else "no clear rule".
    """
    handicap = MARGIN * np.arange(len(families))
    choice = np.stack([rules.f1 for _, rules in families], 1)
    best = (choice - handicap).argmax(1)
    labels = []
    for i, family in enumerate(best):
        view, rules = families[family]
        if n_fired[i] == 0:
            labels.append(Label("never fired", "dead", (), None, None, 0))
        elif rules.f1[i] >= MIN_F1:
            labels.append(_rule_label(view, rules, i, int(n_clear_held_out[i]), vocabulary))
        elif promotes[i]:
            labels.append(Label(f"promotes {promotes[i]}", "promotes", (), None, None, 0))
        else:
            labels.append(Label("no clear rule", "none", (), None, None, 0))
    return labels


def _rule_label(view: View, rules: Rules, i: int, n_fired_held_out: int, vocabulary: Sequence[str]) -> Label:
    n_held_out, n_both = int(rules.n_held_out[i]), int(rules.n_both[i])
    meanings = view.meaning[rules.items[i][rules.items[i] >= 0]].tolist()
    rule = tuple(RuleItem(*(None if t < 0 else t for t in meaning)) for meaning in meanings)
    f1 = 2 * n_both / max(n_fired_held_out + n_held_out, 1)
    weak = min(int(rules.n_fit[i]), n_held_out) < MIN_SUPPORT or f1 < MIN_HELD_OUT_F1
    return Label(
        text=rule_text(view.kind, rule, vocabulary),
        kind="weak" if weak else view.kind,
        rule=rule,
        precision=n_both / n_held_out if n_held_out else None,
        recall=n_both / n_fired_held_out if n_held_out and n_fired_held_out else None,
        n_held_out=n_held_out,
    )


def rule_text(kind: str, rule: Sequence[RuleItem], vocabulary: Sequence[str]) -> str:
    """A rule as a person reads it: spellings that differ only by case or space are named once."""
    if kind == "token":
        return listed([vocabulary[item.token] for item in rule if item.token is not None])
    if kind == "previous":
        return "after " + listed([vocabulary[item.previous] for item in rule if item.previous is not None])
    pairs = [(vocabulary[a], vocabulary[b]) for a, b in rule if a is not None and b is not None]
    shown = [f"{_quoted(a)} -> {_quoted(b)}" for a, b in pairs[:3]]
    return ", ".join(shown) + (", ..." if len(pairs) > 3 else "")


def listed(texts: Sequence[str], n: int = 4) -> str:
    """The first ``n`` texts in quotes; spellings that differ only by case or space are named once."""
    first_of: dict[str, str] = {}
    for text in texts:
        first_of.setdefault(text.strip().casefold() or text, text)
    distinct = list(first_of.values())
    return ", ".join(map(_quoted, distinct[:n])) + (", ..." if len(distinct) > n else "")


def _quoted(text: str) -> str:
    visible = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return f"'{visible}'" if '"' in visible else f'"{visible}"'


def _trimmed(
    items: Int[np.ndarray, "features 8"],
    both: Int[np.ndarray, "features 8"],
    shown: Int[np.ndarray, "features 8"],
    fired: Int[np.ndarray, " features"],
) -> tuple[Int[np.ndarray, "features 8"], Float[np.ndarray, " features"]]:
    """The shortest beginning of each set whose F1 is within ``TRIM`` of the whole set's."""
    f1 = 2 * both.cumsum(1) / np.maximum(fired[:, None] + shown.cumsum(1), 1)
    length = (f1 >= (1 - TRIM) * f1.max(1, keepdims=True)).argmax(1)
    kept = np.where(np.arange(items.shape[1]) <= length[:, None], items, -1)
    return kept, np.take_along_axis(f1, length[:, None], 1)[:, 0]

