"""Labels without a judge: the rule on tokens that best predicts when a feature fires, scored on other documents.

Three families of rules compete: "the token is one of these", "the token before is one of these", "token and token
before are one of these pairs". A rule is the set of at most ``MAX_ITEMS`` items with the highest F1 on half of the
documents (chosen by hash); precision and recall are those on the other half, which chose nothing.

    precision = matched positions on which the feature clearly fires / matched positions
    recall    = matched positions on which the feature clearly fires / positions on which it clearly fires

A feature fires clearly where it reaches a quarter of its maximum. Positions where it fires below that count neither for
nor against a rule: they are many, they follow no rule that a person would give, and yet they are no silence.

Where no rule describes a feature, its effect on the logits may; else the label says that nothing does.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int

from saelab.features.codes import Pairs
from saelab.features.records import Label, LabelKind, RuleItem
from saelab.features.segments import positive_bits, rank_within
from saelab_kernels.search.hashing import hash64

#: Share of its maximum from which on a feature fires clearly.
CLEAR = 0.25

MAX_ITEMS = 8

#: An item must explain this share of the feature's clear firings: less lengthens the label and says little.
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


@runtime_checkable
class Shown(Protocol):
    """What counting needs to know of a family of rules: which item each position shows, and how many there are."""

    @property
    def item(self) -> Int[np.ndarray, " positions"]: ...

    @property
    def meaning(self) -> Sized:
        """One entry an item."""
        ...


class View(NamedTuple):
    """One family of rules: which item each position shows, and what an item is."""

    kind: LabelKind
    item: Int[np.ndarray, " positions"]
    meaning: Int[np.ndarray, "items 2"]
    """Token before and token of each item; -1 where the item says nothing of it."""


class PerHalf(NamedTuple):
    """A count in each half."""

    fit: Int[np.ndarray, " n"]
    held_out: Int[np.ndarray, " n"]

    @property
    def both(self) -> Int[np.ndarray, " n"]:
        return self.fit + self.held_out


class Counts(NamedTuple):
    """How the features of a block and the items of one view meet, in the fitting documents (``fit``) and the others.

    One entry for each pair of feature and item that meet clearly, sorted by both.
    """

    feature: Int[np.ndarray, " entries"]
    """Counted from the block's first."""
    item: Int[np.ndarray, " entries"]
    clear: PerHalf
    """By entry: positions that show the item and on which the feature clearly fires."""
    fired: PerHalf
    """By entry: those on which it fires at all."""
    shown: PerHalf
    """By item: positions that show it."""
    total: PerHalf
    """By feature: positions on which it clearly fires."""

    def scored(self) -> PerHalf:
        """By entry: positions that show the item and count for or against it, weak firings left out."""
        halves = zip(self.shown, self.fired, self.clear, strict=True)
        return PerHalf(*(shown[self.item] - fired + clear for shown, fired, clear in halves))


class Rules(NamedTuple):
    """The best rule of each feature within one family, and how it did."""

    items: Int[np.ndarray, "features max_items"]
    """-1 where there are fewer."""
    f1: Float[np.ndarray, " features"]
    """On the fitting documents."""
    n_fit: Int[np.ndarray, " features"]
    """Matched positions in the fitting documents, weak firings left out."""
    n_held_out: Int[np.ndarray, " features"]
    """The same in the others."""
    n_both: Int[np.ndarray, " features"]
    """Those of ``n_held_out`` on which the feature clearly fires."""


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


def count_firings(pairs: Pairs, clear: Pairs, view: Shown, split: Halves) -> Counts:
    """Count how the features of ``pairs`` meet the items of a view; ``clear`` are their clear firings."""
    n_items = len(view.meaning)
    some, every = _meetings(clear, view, split), _meetings(pairs, view, split)
    feature = np.repeat(np.arange(pairs.n_features), np.diff(some.indptr))
    item = some.indices.astype(np.int64)
    # whatever meets clearly also meets, so each entry of the one is found in the other
    keys = np.repeat(np.arange(pairs.n_features), np.diff(every.indptr)) * n_items + every.indices
    fired = every.data[np.searchsorted(keys, feature * n_items + item)]
    met_clearly = _unpacked(some.data)
    totals = (np.bincount(feature, weights=n, minlength=pairs.n_features).astype(np.int64) for n in met_clearly)
    return Counts(
        feature=feature,
        item=item,
        clear=met_clearly,
        fired=_unpacked(fired),
        shown=PerHalf(*(np.bincount(view.item[half], minlength=n_items) for half in split)),
        total=PerHalf(*totals),
    )


def best_rules(counts: Counts) -> Rules:
    """The rule of highest F1 on the fitting documents for every feature of a block, with its counts on the others."""
    scored = counts.scored()
    entries, f1 = best_sets(counts.feature, counts.clear.fit, scored.fit, counts.total.fit)
    feature, slot = np.nonzero(entries >= 0)
    chosen = entries[feature, slot]

    def total(values: Int[np.ndarray, " entries"]) -> Int[np.ndarray, " features"]:
        return np.bincount(feature, weights=values[chosen], minlength=len(entries)).astype(np.int64)

    items = np.full_like(entries, -1)
    items[feature, slot] = counts.item[chosen]
    return Rules(
        items=items,
        f1=f1,
        n_fit=total(scored.fit),
        n_held_out=total(scored.held_out),
        n_both=total(counts.clear.held_out),
    )


def best_sets(
    feature: Int[np.ndarray, " entries"],
    clear: Int[np.ndarray, " entries"],
    scored: Int[np.ndarray, " entries"],
    total: Int[np.ndarray, " features"],
) -> tuple[Int[np.ndarray, "features max_items"], Float[np.ndarray, " features"]]:
    """For every feature the set of at most ``MAX_ITEMS`` entries with the highest F1, most helpful first, and that F1.

    Items are disjoint, so the F1 of a set is a ratio of sums, 2 sum(clear) / (total + sum(scored)). Dinkelbach's method
    (1967) maximises such a ratio exactly: with ratio r at hand, the best set for "numerator - r * denominator" is the
    items of largest positive 2 clear - r scored; its ratio is the next r, until nothing changes.

    Returns positions in the given arrays (sorted by feature), -1 where a set is smaller.
    """
    n_features = len(total)
    kept = np.flatnonzero(clear >= np.maximum(2, MIN_SHARE * total[feature]))
    feature, clear, scored = feature[kept], clear[kept], scored[kept]
    ratio = np.zeros(n_features)
    np.maximum.at(ratio, feature, 2 * clear / (total[feature] + scored))
    while True:
        gain = 2 * clear - ratio[feature] * scored
        order = np.lexsort((-gain, feature))  # stable: equals stay in the order of their items
        order = order[(gain[order] > 0) & (rank_within(feature[order]) < MAX_ITEMS)]
        numerator = np.bincount(feature[order], weights=2 * clear[order], minlength=n_features)
        denominator = total + np.bincount(feature[order], weights=scored[order], minlength=n_features)
        improved = numerator / np.maximum(denominator, 1)
        if (improved <= ratio + 1e-12).all():
            break
        ratio = np.maximum(ratio, improved)
    entries = np.full((n_features, MAX_ITEMS), -1, np.int64)
    clear_of, scored_of = np.zeros((2, n_features, MAX_ITEMS), np.int64)
    rank = rank_within(feature[order])
    for table, values in ((entries, kept), (clear_of, clear), (scored_of, scored)):
        table[feature[order], rank] = values[order]
    # the shortest beginning of each set whose F1 is nearly the whole set's
    f1 = 2 * clear_of.cumsum(1) / np.maximum(total[:, None] + scored_of.cumsum(1), 1)
    length = (f1 >= (1 - TRIM) * f1.max(1, keepdims=True)).argmax(1)
    entries[np.arange(MAX_ITEMS) > length[:, None]] = -1
    return entries, np.take_along_axis(f1, length[:, None], 1)[:, 0]


class Specific(NamedTuple):
    """The items a feature is most specific to, best first; -1 and 0 where there are fewer."""

    items: Int[np.ndarray, "features n"]
    n_fired: Int[np.ndarray, "features n"]
    n_clear: Int[np.ndarray, "features n"]


def specific_items(counts: Counts, *, n: int) -> Specific:
    """The ``n`` items with the highest F1 each by itself, over all documents."""
    feature = counts.feature
    f1 = 2 * counts.clear.both / (counts.total.both[feature] + counts.scored().both)
    # the sort is stable and items ascend, so equals keep the lower item first
    order = np.argsort(feature << 32 | 0xFFFFFFFF - positive_bits(f1), kind="stable")
    rank = rank_within(feature)
    order, rank = order[rank < n], rank[rank < n]
    found = Specific(*(np.full((len(counts.total.fit), n), empty, np.int64) for empty in (-1, 0, 0)))
    for table, values in zip(found, (counts.item, counts.fired.both, counts.clear.both), strict=True):
        table[feature[order], rank] = values[order]
    return found


def write_labels(
    families: Sequence[tuple[View, Rules]],
    n_clear_held_out: Int[np.ndarray, " features"],
    n_fired: Int[np.ndarray, " features"],
    promotes: Sequence[str],
    vocabulary: Sequence[str],
) -> list[Label]:
    """One label a feature: the best family of rules (the simpler one within ``MARGIN``), else the tokens that it
    clearly promotes (``promotes``, "" for none), else "no clear rule".
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
    shown = [f"{quoted(a)} -> {quoted(b)}" for a, b in pairs[:3]]
    return ", ".join(shown) + (", ..." if len(pairs) > 3 else "")


def listed(texts: Sequence[str], n: int = 4) -> str:
    """The first ``n`` texts in quotes; spellings that differ only by case or space are named once."""
    first_of: dict[str, str] = {}
    for text in texts:
        first_of.setdefault(text.strip().casefold() or text, text)
    distinct = list(first_of.values())
    return ", ".join(map(quoted, distinct[:n])) + (", ..." if len(distinct) > n else "")


def quoted(text: str) -> str:
    """A token as a person reads it: in quotes, with its space, line breaks visible."""
    visible = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return f"'{visible}'" if '"' in visible else f'"{visible}"'


def _meetings(pairs: Pairs, view: Shown, split: Halves) -> scipy.sparse.csr_array:
    """Features by items: how many positions show the item and make the feature fire, packed for both halves."""
    n_positions, counted = len(view.item), split.fit | split.held_out
    ones = np.ones(len(pairs.positions), np.int64)
    fires = scipy.sparse.csr_array((ones, pairs.positions, pairs.offsets), shape=(pairs.n_features, n_positions))
    # both halves in one product: a fitting position adds 1, another one 2^32
    weights = np.where(split.fit, 1, 1 << 32)[counted]
    offsets = np.concatenate([[0], np.cumsum(counted)])
    shows = scipy.sparse.csr_array((weights, view.item[counted], offsets), shape=(n_positions, len(view.meaning)))
    meetings = fires @ shows
    meetings.sort_indices()
    return meetings


def _unpacked(counts: Int[np.ndarray, " n"]) -> PerHalf:
    return PerHalf(counts & 0xFFFFFFFF, counts >> 32)
