from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.features import label, planted
from saelab.features.codes import Pairs
from saelab.features.index import FeatureIndex
from saelab.features.records import RuleItem


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> FeatureIndex:
    return planted.plant_index(tmp_path_factory.mktemp("planted"))


def test_planted_rules_are_found(index):
    assert index.label(0).kind == "token"
    assert index.label(0).text == '" feet", " foot"'
    assert index.label(1).kind == "previous"
    assert index.label(1).text == 'after " United"'
    assert index.label(2).kind == "bigram"
    assert index.label(2).rule == (RuleItem(planted.NEW, planted.YORK),)
    assert index.label(2).text == '" New" -> " York"'
    for i in range(3):
        assert index.label(i).precision == index.label(i).recall == index.label(i).f1 == 1


def test_what_follows_no_rule_is_not_given_one(index):
    for i in (3, 4):  # one document, and chance
        assert index.label(i).kind in ("none", "promotes")
        assert index.label(i).rule == ()
        assert index.label(i).precision is None
    assert index.label(5).kind == "dead"
    assert index.label(5).precision is None


def test_five_occurrences_are_too_few_to_trust(index):
    assert index.label(6).kind == "weak"
    assert index.label(6).n_held_out <= 5


def test_precision_and_recall_are_those_of_the_documents_that_did_not_choose_the_rule(tmp_path):
    text = planted.plant(tmp_path / "planted.json")
    built = planted.build_index(text.sae, text.store, text.model, tmp_path / "index")
    split = label.halves(text.store.planted_docs, seed=0)
    assert not (split.fit & split.held_out).any()
    for i in (0, 7, 20):
        found = built.label(i)
        tokens = [item.token for item in found.rule]
        acts = text.store.planted_acts[..., i].numpy().reshape(-1)
        fires = (acts >= acts.max() / 4) & split.held_out
        counted = split.held_out & (fires | (acts == 0))
        matched = np.isin(text.store.planted_tokens.reshape(-1), tokens) & counted
        assert found.n_held_out == matched.sum()
        assert found.precision == pytest.approx((matched & fires).sum() / matched.sum())
        assert found.recall == pytest.approx((matched & fires).sum() / fires.sum())


def test_a_document_lies_on_one_side_of_the_split():
    docs = np.arange(400).reshape(10, 40) // 23
    split = label.halves(docs, seed=3)
    for doc in np.unique(docs):
        here = (docs == doc).reshape(-1)
        assert not (split.fit[here].any() and split.held_out[here].any())
    assert not (split.fit | split.held_out)[::40].any()  # BOS is in neither
    assert (label.halves(docs, seed=4).fit != split.fit).any()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_no_other_set_of_items_has_a_higher_f1(seed, max_items):
    rng = np.random.default_rng(seed)
    n_items, n_features = 7, 3
    shown = rng.integers(1, 40, n_items)
    both = np.array([rng.integers(0, shown + 1) for _ in range(n_features)])
    fired = both.sum(1) + rng.integers(0, 30, n_features)
    feature, item = np.nonzero(both >= 0)
    scored = np.tile(shown, n_features)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MAX_ITEMS", max_items), ("MIN_SHARE", 0), ("TRIM", 0)):
            patch.setattr(label, name, value)
        entries, f1 = label.best_sets(feature, both.reshape(-1), scored, fired)

    def score(i, chosen):
        return 2 * both[i, chosen].sum() / (fired[i] + shown[chosen].sum())

    for i in range(n_features):
        usable = [j for j in range(n_items) if both[i, j] >= 2]
        best = max((score(i, list(c)) for n in range(1, max_items + 1) for c in combinations(usable, n)), default=0)
        assert f1[i] == pytest.approx(best)
        chosen = item[entries[i][entries[i] >= 0]].tolist()
        assert len(chosen) <= max_items
        assert (score(i, chosen) if chosen else 0) == pytest.approx(best)


def test_an_item_that_adds_little_is_left_out():
    clear, total = np.array([100, 3]), np.array([103])
    entries, f1 = label.best_sets(np.array([0, 0]), clear, clear, total)
    assert entries[0, :2].tolist() == [0, -1]
    assert f1[0] == pytest.approx(200 / 203)


def test_counts_equal_a_loop_over_the_pairs():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 6, (5, 8)).astype(np.int32)
    docs = np.arange(40).reshape(5, 8) // 7
    fires = rng.random((3, 40)) < 0.4
    fires[:, ::8] = False
    features, positions = np.nonzero(fires)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(features, minlength=3))])
    clearly = fires & (rng.random((3, 40)) < 0.6)
    values = np.where(clearly[features, positions], 1, 0.1).astype(np.float32)
    pairs = Pairs(offsets, positions.astype(np.int32), values)
    split = label.halves(docs, seed=0)
    for view in label.views(tokens, 6):
        counts = label.count_firings(pairs, pairs.above(np.full(3, 0.25, np.float32)), view, split)
        scored = counts.scored()
        found = {(f, i): e for e, (f, i) in enumerate(zip(counts.feature, counts.item, strict=True))}
        for f in range(3):
            for i in range(len(view.meaning)):
                for n, half in enumerate(split):
                    here = (view.item == i) & half
                    if (f, i) not in found:
                        assert not (here & clearly[f]).any()
                        continue
                    e = found[f, i]
                    assert counts.clear[n][e] == (here & clearly[f]).sum()
                    assert counts.fired[n][e] == (here & fires[f]).sum()
                    assert scored[n][e] == (here & ~(fires[f] & ~clearly[f])).sum()
        assert counts.total.fit.tolist() == (clearly & split.fit).sum(1).tolist()
        for position in np.flatnonzero(split.fit | split.held_out):
            before, token = view.meaning[view.item[position]]
            assert token in (-1, tokens.reshape(-1)[position])
            assert before in (-1, tokens.reshape(-1)[position - 1])


def labels_for(rules: list[dict], *, n_clear_held_out, n_fired, promotes):
    """Labels of features whose three families did as ``rules`` say (missing counts: plenty)."""
    families = []
    for kind in ("token", "previous", "bigram"):
        view = label.View(kind, np.zeros(1, np.int64), np.array([[1, 2]] if kind == "bigram" else [[-1, 2]]))
        columns = [
            np.array([rule.get(kind, {}).get(name, default) for rule in rules])
            for name, default in (("f1", 0.0), ("n_fit", 100), ("n_held_out", 100), ("n_both", 80))
        ]
        items = np.tile([0] + [-1] * 7, (len(rules), 1))
        families.append((view, label.Rules(items, *columns)))
    return label.write_labels(families, np.array(n_clear_held_out), np.array(n_fired), promotes, ["", "x", "y"])


def test_a_label_is_the_best_rule_or_the_logits_or_nothing():
    rules = [
        {"token": {"f1": 0.6}, "bigram": {"f1": 0.6 + label.MARGIN}},  # not enough better to be worth a pair
        {"token": {"f1": 0.6}, "bigram": {"f1": 0.7}},
        {"token": {"f1": 0.6, "n_fit": 9}},  # too few in one half
        {"token": {"f1": 0.6, "n_held_out": 9, "n_both": 9}},  # or in the other
        {"token": {"f1": 0.6, "n_both": 3}},  # does not hold on the other documents
        {"token": {"f1": label.MIN_F1 - 0.01}},
        {"token": {"f1": label.MIN_F1 - 0.01}},
        {"token": {"f1": 0.9, "n_held_out": 0, "n_both": 0}},
        {"token": {"f1": 0.9}},
    ]
    promotes = [""] * 5 + ['"z"'] + [""] * 3
    found = labels_for(rules, n_clear_held_out=[100] * 9, n_fired=[500] * 8 + [0], promotes=promotes)
    kinds = ["token", "bigram", "weak", "weak", "weak", "promotes", "none", "weak", "dead"]
    assert [each.kind for each in found] == kinds
    assert found[1].text == '"x" -> "y"'
    assert found[5].text == 'promotes "z"'
    assert (found[0].precision, found[0].recall, found[0].n_held_out) == (0.8, 0.8, 100)
    assert found[7].precision is None


@pytest.mark.parametrize(
    ("kind", "rule", "text"),
    [
        ("token", [(None, 0), (None, 1), (None, 2)], '" The", "cat"'),  # " The" and "the" are one word to a reader
        ("previous", [(2, None)], 'after "cat"'),
        ("bigram", [(0, 2), (2, 3)], '" The" -> "cat", "cat" -> "\\n"'),
        ("token", [(None, 4)], "'\"'"),
    ],
)
def test_labels_read_well(kind, rule, text):
    vocabulary = [" The", "the", "cat", "\n", '"']
    assert label.rule_text(kind, [RuleItem(*item) for item in rule], vocabulary) == text
