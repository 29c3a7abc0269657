from __future__ import annotations

import numpy as np
import pytest
import torch

from saelab.features.explain import Candidate, Explained, Tally
from saelab.features.explain_report import markdown, summary
from saelab.features.explain_run import ExplainConfig
from saelab.features.explain_sides import token_share
from saelab.features.explain_summary import by_firings, compare, measured, median_difference, of_kind, scorable, values


def explained(number: int, *, n_score: int, n_both: int, n_matched: int, kind: str = "token set") -> Explained:
    candidate = Candidate(kind, '"x"', Tally(10, 5, 10), Tally(n_matched, n_both, n_score), (1,))
    return Explained(number, (20, 10, n_score), (candidate,))


def side(rng: np.random.Generator, n: int, precision: float) -> list[Explained]:
    hits = rng.binomial(20, precision, n)
    return [explained(i, n_score=20, n_both=int(h), n_matched=20) for i, h in enumerate(hits)]


def test_the_best_is_chosen_by_the_choosing_documents_and_measured_by_the_scoring_ones():
    lucky = Candidate("token set", '"a"', Tally(10, 2, 10), Tally(10, 10, 10))
    better = Candidate("tree", "b", Tally(10, 9, 10), Tally(10, 6, 10))
    feature = Explained(0, (10, 10, 10), (lucky, better))
    assert feature.best is better
    assert measured(feature.best, "precision") == 0.6


def test_of_equally_good_explanations_the_simpler_one_is_taken():
    kinds = [Candidate(kind, kind, Tally(10, 9, 10), Tally(1, 1, 1)) for kind in ("token set", "regex", "tree")]
    assert Explained(0, (1, 1, 1), tuple(kinds)).best.kind == "token set"


def test_an_explanation_that_is_never_right_where_it_is_chosen_is_none():
    wrong = Candidate("token set", '"a"', Tally(10, 0, 10), Tally(10, 10, 10))
    assert Explained(0, (1, 1, 1), (wrong,)).best is None


def test_features_without_an_explanation_count_as_zero_and_those_that_do_not_fire_as_nothing():
    good = explained(0, n_score=10, n_both=10, n_matched=10)
    bare = Explained(1, (5, 5, 5), ())
    silent = Explained(2, (5, 5, 0), ())
    matches_nothing = explained(3, n_score=10, n_both=0, n_matched=0)
    able = scorable([good, bare, silent, matches_nothing])
    assert [e.feature for e in able] == [0, 1, 3]
    assert values(able, "precision").tolist() == [1, 0, 0]
    assert of_kind(able, "tree", "f1").tolist() == [0, 0, 0]


def test_the_difference_of_medians_has_an_interval_that_finds_a_true_one_and_no_false_one():
    rng = np.random.default_rng(0)
    own, control, same = side(rng, 300, 0.9), side(rng, 300, 0.6), side(rng, 300, 0.9)
    found = {c.measure: c for c in compare(own, control, draws=400, seed=0)}
    assert found["precision"].difference.low > 0.2
    assert found["precision"].own.low <= 0.9 <= found["precision"].own.high
    none = {c.measure: c for c in compare(own, same, draws=400, seed=0)}["precision"].difference
    assert none.low <= 0 <= none.high


def test_the_median_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(60):
        a, b = rng.normal(0, 1, 80), rng.normal(0.5, 1, 80)
        interval = median_difference(b, a, draws=200, seed=seed)
        hits += interval.low <= 0.5 <= interval.high
    assert hits >= 51


def test_classes_by_firings_hold_every_feature_once():
    features = [Explained(i, (n, 0, 1), ()) for i, n in enumerate((0, 28, 29, 99, 500, 5000))]
    assert [n for n, _ in by_firings(features, "f1")] == [2, 1, 1, 1, 1]


def test_the_report_says_plainly_where_there_is_no_control():
    rng = np.random.default_rng(0)
    about = {
        "sae": "runs/x/sae", "arch": "topk", "n_features": 50, "hook_name": "h", "model": "m", "documents": [4, 2, 2],
        "tokens": [400, 200, 200], "clear": 0.25, "seed": 0, "encoder": "e", "judge": None,
        "no_control": "it was not asked for", "sides": {"SAE": ""},
    }  # fmt: skip
    features = {"SAE": side(rng, 50, 0.8)}
    text = markdown(summary(features, {"SAE": {}}, about, ExplainConfig(draws=100)))
    assert "There is no random-weights control: it was not asked for." in text
    about |= {
        "token_share": {"SAE": 0.68, "random weights": 0.11},
        "no_control": None,
        "sides": {"SAE": "", "random weights": "9 training tokens"},
    }
    both = features | {"random weights": side(rng, 50, 0.3)}
    scores = {"SAE": {"surprisal": {1: 0.8, 2: 0.7}}, "random weights": {"surprisal": {1: 0.5, 2: 0.6}}}
    result = summary(both, scores, about, ExplainConfig(draws=100))
    assert result["comparisons"][0]["difference"]["low"] > 0
    assert result["scores"]["surprisal"]["difference"]["value"] == pytest.approx(0.2)
    assert "9 training tokens" in markdown(result)
    assert "explains 68% of the variance that the SAE reads and 11% of what the control reads" in markdown(result)


def test_the_share_of_the_token_is_one_where_it_is_all_and_nothing_where_it_is_noise():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, 4000)
    table, noise = rng.normal(size=(40, 16)), rng.normal(size=(4000, 16))
    whole, none, half = (torch.from_numpy(x).float() for x in (table[tokens], noise, table[tokens] + noise))
    assert token_share(whole, tokens) == pytest.approx(1, abs=1e-6)
    assert -0.05 < token_share(none, tokens) < 0.02  # each token's own position is left out of its mean
    assert token_share(half, tokens) == pytest.approx(0.5, abs=0.05)
    assert token_share(whole[:40], np.arange(40)) is None
