from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.features import planted
from saelab.features.codes import Pairs
from saelab.features.explain import Explained, Tally, all_explainers, explain_block, tally
from saelab.features.explainers import columns, patterns, trees
from saelab.features.explainers.interface import Explainer, Explanation, Fired, Firings, firings_of
from saelab.features.explainers.items import best_items
from saelab.features.explainers.ngrams import ngram_family
from saelab.features.explainers.promoted import PromotedExplainer
from saelab.features.explainers.text import Text, text_of

N_FEATURES = 12


def pairs_of(acts: np.ndarray) -> Pairs:
    """Of activations [features, positions]."""
    features, positions = np.nonzero(acts > 0)
    offsets = np.concatenate([[0], np.cumsum((acts > 0).sum(1))])
    return Pairs(offsets, positions, acts[features, positions].astype(np.float32))


def firings(acts: np.ndarray, *, clear: float = 0.25) -> Firings:
    return firings_of(pairs_of(acts), acts.max(1), first=0, clear=clear)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Text:
    where = planted.plant(tmp_path_factory.mktemp("planted") / "planted.json", n_features=N_FEATURES, n_rows=320)
    return text_of(where.store.planted_tokens, where.store.planted_docs, where.model.vocabulary, seed=0)


@pytest.fixture(scope="module")
def fired(tmp_path_factory) -> Firings:
    where = planted.plant(tmp_path_factory.mktemp("planted") / "planted.json", n_features=N_FEATURES, n_rows=320)
    return firings(where.store.planted_acts.numpy().reshape(-1, N_FEATURES).T)


@pytest.fixture(scope="module")
def explained(text, fired) -> dict[int, Explained]:
    return {each.feature: each for each in explain_block(all_explainers(text, None, seed=0), fired, text)}


def test_a_document_is_for_one_purpose_and_bos_for_none(text):
    docs = text.docs.reshape(-1)
    owners = [set(docs[part].tolist()) for part in text.parts]
    for a, b in combinations(owners, 2):
        assert not a & b
    assert len(owners[0]) > len(owners[1]) > 0 < len(owners[2])
    assert not any(part[:: text.context].any() for part in text.parts)
    assert sum(part.sum() for part in text.parts) == text.n_positions - len(text.tokens)


@pytest.mark.parametrize("n", [-2, -1, 0, 1, 3])
def test_the_token_so_many_places_before_stays_in_its_row(text, n):
    shown = text.before(n).reshape(text.tokens.shape)
    for row, column in ((0, 0), (0, text.context - 1), (3, 1), (5, 30)):
        inside = 0 <= column - n < text.context
        assert shown[row, column] == (text.tokens[row, column - n] if inside else -1)


def test_each_planted_feature_gets_the_kind_of_explanation_that_it_deserves(explained):
    assert (explained[0].best.kind, explained[0].best.text) == ("token set", '" feet", " foot"')
    assert (explained[1].best.kind, explained[1].best.text) == ("n-gram", 'after " United"')
    assert (explained[2].best.kind, explained[2].best.text) == ("n-gram", '" New" -> " York"')
    for i in (0, 1, 2, 8, 9):
        assert explained[i].best.score.precision == explained[i].best.score.recall == 1


def test_what_happens_at_random_is_explained_no_better_than_by_chance(explained, fired, text):
    best = explained[4].best
    clear, weak = (np.count_nonzero(text.parts.score[positions]) for positions in fired.of(4))
    chance = clear / (text.parts.score.sum() - weak)  # precision of any rule that knows nothing
    assert best is None or best.score.precision < 1.5 * chance


def test_a_feature_that_never_fires_is_not_explained(explained):
    assert 5 not in explained


def test_all_kinds_share_one_interface(text, fired):
    promoted = np.zeros((N_FEATURES, 4), np.int64) + np.array([planted.FEET, planted.FOOT, planted.NEW, planted.UNITED])
    for explainer in all_explainers(text, promoted, seed=0):
        assert isinstance(explainer, Explainer)
        found = explainer.explain(fired)
        assert len(found) == N_FEATURES
        for explanation in found:
            if explanation is not None:
                assert isinstance(explanation, Explanation)
                assert explanation.text
                assert explanation.fires().shape == (text.n_positions,)


def test_explainers_read_the_fitting_documents_alone(text, fired):
    """What happens in the other documents may change at will: the explanations stay."""
    rng = np.random.default_rng(0)
    kept = text.parts.fit[fired.pairs.positions]
    acts = np.zeros((N_FEATURES, text.n_positions), np.float32)
    acts[fired.pairs.features[kept], fired.pairs.positions[kept]] = fired.pairs.values[kept]
    elsewhere = np.flatnonzero(text.parts.choose | text.parts.score)
    noise = acts.copy()
    noise[:, elsewhere] = rng.random((N_FEATURES, len(elsewhere))) < 0.02
    maxima = np.ones(N_FEATURES, np.float32)
    promoted = np.tile(np.arange(1, 7), (N_FEATURES, 1))
    for explainer in all_explainers(text, promoted, seed=0):
        plain, noisy = (explainer.explain(firings_of(pairs_of(a), maxima, first=0, clear=0.25)) for a in (acts, noise))
        for a, b in zip(plain, noisy, strict=True):
            assert (a and a.text) == (b and b.text), explainer.name
            assert a is None or (a.fires() == b.fires()).all()


def test_a_tally_counts_by_hand_and_leaves_weak_firings_out():
    predicted = np.array([True, True, True, True, False, False, True, False])
    part = np.array([True] * 6 + [False] * 2)
    found = tally(predicted, Fired(np.array([0, 1, 4, 6]), np.array([2, 5])), part)
    assert found == Tally(n_matched=3, n_both=2, n_clear=3)  # position 2 is weak, 6 lies elsewhere
    assert found.precision == found.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)


def test_a_tally_of_nothing_has_no_precision_and_no_recall():
    assert Tally(0, 0, 5).precision is None
    assert Tally(5, 0, 0).recall is None
    assert Tally(0, 0, 0).f1 == 0


@pytest.mark.parametrize("offsets", [(0,), (1,), (2,), (-1,), (1, 0), (2, 0), (2, 1, 0)])
def test_every_position_shows_the_ngram_that_stands_there(text, offsets):
    family = ngram_family(text, offsets)
    shown = family.meaning[family.item]
    expected = np.stack([text.before(n) for n in offsets], 1)
    outside = (expected < 0).any(1)
    assert (shown[~outside] == expected[~outside]).all()
    assert (shown[outside] == -1).all()


def test_no_rule_is_about_what_lies_outside_the_row(text):
    acts = np.zeros((1, text.n_positions), np.float32)
    acts[0, 1 :: text.context] = 1  # right behind BOS, which has no token two before
    assert best_items(ngram_family(text, (2,)), firings(acts), text).rule(ngram_family(text, (2,)), 0) is None


TOKENS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs",)) | st.sampled_from(" aZz09.,\n-É ²٣K"),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=200)
@given(TOKENS, TOKENS)
def test_a_token_matches_the_pattern_of_its_own_shape_and_of_no_other(a, b):
    assert re.fullmatch(patterns.shape(a), a)
    assert bool(re.fullmatch(patterns.shape(a), b)) == (patterns.shape(a) == patterns.shape(b))


@settings(deadline=None, max_examples=40)
@given(st.lists(TOKENS, min_size=2, max_size=30, unique=True), st.integers(0, 1000))
def test_looking_tokens_up_says_the_same_as_the_regular_expression_that_is_shown(vocabulary, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, len(vocabulary), (6, 9)).astype(np.int32)
    text = text_of(tokens, np.arange(54).reshape(6, 9), tuple(vocabulary), seed=0)
    for family in patterns.patterns(text).families[:-1]:
        usable = np.flatnonzero(family.meaning[:, 0] >= 0)
        if not len(usable):
            continue
        items = rng.choice(usable, min(3, len(usable)), replace=False)
        expression = family.describe(family.meaning[items].tolist())
        assert expression[0] == expression[-1] == "/"
        expected = [re.fullmatch(expression[1:-1], vocabulary[t]) is not None for t in tokens.reshape(-1)]
        assert np.isin(family.item, items).tolist() == expected, expression


def test_the_logit_table_goes_as_far_down_its_list_as_pays(text):
    acts = np.zeros((1, text.n_positions), np.float32)
    acts[0, np.isin(text.before(-1), [planted.FEET, planted.FOOT])] = 1
    promoted = np.array([[planted.FEET, planted.FOOT, planted.NEW, 30]])
    (rule,) = PromotedExplainer(promoted, text).explain(firings(acts))
    assert rule is not None
    assert rule.text == 'before " feet", " foot"'
    assert (rule.fires() == np.isin(text.before(-1), [planted.FEET, planted.FOOT])).all()


def test_a_promoted_token_that_the_text_lacks_does_no_harm(text):
    lacking = len(text.vocabulary) - 1
    tokens = np.where(text.tokens == lacking, 8, text.tokens)
    without = Text(tokens, text.docs, text.vocabulary, text.parts)
    acts = (tokens.reshape(-1) == planted.FEET)[None].astype(np.float32)
    (rule,) = PromotedExplainer(np.array([[lacking, planted.FEET]]), without).explain(firings(acts))
    assert rule is not None
    assert (rule.fires() == (acts[0] > 0)).all()


def test_columns_say_the_same_at_some_positions_as_everywhere(text):
    positions = np.array([0, 1, 2, 63, 64, 65, 700, text.n_positions - 1])
    asked = [*columns.fixed_columns(text), columns.TokenAt(0, (8, 9)), columns.TokenAt(2, (8,)), columns.Lately(8)]
    for column in asked:
        assert (column.at(text, positions) == column.values(text)[positions]).all()


def test_shortly_after_looks_back_within_the_row_only():
    tokens = np.full((2, 20), 1, np.int32)
    tokens[0, 3] = tokens[0, 19] = 2
    text = text_of(tokens, np.zeros((2, 20), np.int64), ("a", "b", "c"), seed=0)
    found = columns.Lately(2).values(text).reshape(2, 20)
    assert np.flatnonzero(found[0]).tolist() == list(range(4, 4 + columns.SHORTLY))
    assert not found[1].any()


def test_fixed_columns_count_as_a_person_would():
    vocabulary = ("<s>", "\n", " (", ")", " x", " y")
    tokens = np.array([[0, 4, 2, 4, 3, 1, 4, 4]], np.int32)
    text = text_of(tokens, np.zeros((1, 8), np.int64), vocabulary, seed=0)
    found = {column.name: column.numbers.tolist() for column in columns.fixed_columns(text)}
    assert found["tokens since the last line break"] == [0, 1, 2, 3, 4, 0, 1, 2]
    assert found["a bracket is open"] == [False, False, False, True, False, False, False, False]
    assert found["the token stood earlier in the row"] == [False, False, False, True, False, False, True, True]
    assert found["the token repeats the one before"] == [False] * 7 + [True]
    assert found["the token before holds a line break"] == [False] * 6 + [True, False]


def test_a_trees_leaves_are_those_of_scikit_learn():
    from sklearn.tree import DecisionTreeClassifier

    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 9, (3, 400)).astype(np.int16)
    fires = (numbers[0] > 4) & (numbers[1] < 3)
    text = text_of(np.ones((20, 20), np.int32), np.zeros((20, 20), np.int64), ("a", "b"), seed=0)
    asked = tuple(columns.Fixed(f"column {i}", numbers[i]) for i in range(3))
    grown = trees.grow(numbers.T.astype(np.float32), fires)
    weight = np.where(fires, 0.5 / fires.sum(), 0.5 / (~fires).sum())
    theirs = DecisionTreeClassifier(max_depth=trees.DEPTH, min_samples_leaf=trees.MIN_LEAF, random_state=0)
    theirs.fit(numbers.T.astype(np.float32), fires, sample_weight=weight)
    leaf = trees.leaf_of(grown, asked, text)
    assert (leaf == theirs.apply(numbers.T.astype(np.float32))).all()
    everywhere = np.ones(400, bool)
    leaves = trees.best_leaves(grown, leaf, np.flatnonzero(fires), np.empty(0, int), everywhere)
    rule = trees.TreeRule(grown, asked, leaves, text)
    assert (rule.fires() == fires).all()
    assert set(rule.text.split(" and ")) == {"column 0 above 4", "column 1 at most 2"}


def test_a_tree_sees_what_no_set_of_tokens_can(text):
    """Fires on the second half of a row, and there after one frequent token only."""
    column = np.tile(np.arange(text.context), len(text.tokens))
    fires = (column > 30) & (text.before(1) == 7) & (column > 0)
    found = explain_block(all_explainers(text, None, seed=0), firings(fires[None].astype(np.float32)), text)[0]
    assert found.best.kind == "tree"
    assert found.best.score.f1 > 0.95 > max(c.score.f1 for c in found.candidates if c.kind != "tree")


def test_explained_features_survive_a_file(explained):
    for each in explained.values():
        assert Explained.from_json(each.to_json()) == each


def test_a_trees_leaves_are_chosen_by_the_fitting_documents():
    """Outside them leaf 2 is shown without end, and that it is silent there must not count."""
    grown = trees.Grown((trees.Split(0, 0.5, 1, 2), None, None))
    leaf = np.array([1] * 40 + [2] * 10 + [2] * 500)
    fit = np.arange(550) < 50
    clear = np.concatenate([np.arange(10), np.arange(40, 50)])
    assert trees.best_leaves(grown, leaf, clear, np.empty(0, int), fit) == (2,)
    assert trees.best_leaves(grown, leaf, clear[:1], np.empty(0, int), fit) == ()  # one firing is no rule
