"""Absorption on SAEs and words where it is known."""

from __future__ import annotations

import numpy as np
import pytest

from saelab.errors import ConfigError
from saelab.evals.absorption import AbsorptionConfig, absorption, first_letters, single_token_words, split_set

D = 8
LETTER, OTHER = np.eye(D)[0], np.eye(D)[1]


def scored(letter_act: float, absorber_act: float, *, cosine: float = 1.0, b_dec=None, main=(0,)):
    """One word of projection 1: feature 0 is the letter's direction, feature 1 points to it with ``cosine``.

    Closed form: M = letter_act, A = absorber_act * cosine, P = 1.
    """
    W_dec = np.stack([LETTER, cosine * LETTER + np.sqrt(1 - cosine**2) * OTHER])
    b_dec = np.zeros(D) if b_dec is None else b_dec
    acts = (LETTER + b_dec)[None]
    found = absorption(acts, np.array([[letter_act, absorber_act]]), W_dec, b_dec, 3.0 * LETTER, np.array(main))
    return bool(found.full[0]), float(found.fraction[0])


def test_a_word_that_its_letter_carries_is_not_absorbed():
    assert scored(1.0, 0.0) == (False, 0.0)


def test_a_word_that_another_feature_carries_is_absorbed_whole():
    assert scored(0.0, 1.0) == (True, 1.0)


def test_shared_work_is_absorbed_in_part():
    full, fraction = scored(0.25, 0.75)
    assert not full
    assert fraction == pytest.approx(0.75)
    # the absorber cannot take more than what the main features leave
    assert scored(0.5, 2.0)[1] == pytest.approx(0.5)


def test_below_four_tenths_of_the_projection_nothing_counts():
    assert scored(0.0, 0.39) == (False, 0.0)
    assert scored(0.0, 0.41) == (True, 1.0)
    assert scored(0.3, 0.39)[1] == 0.0


def test_features_off_the_letters_direction_do_not_absorb():
    assert scored(0.0, 10.0, cosine=0.05) == (True, 0.0)  # above 0.025, the bound of full absorption, below 0.1
    assert scored(0.0, 40.0, cosine=0.02) == (False, 0.0)


def test_a_silent_main_feature_is_needed_for_full_absorption():
    assert scored(1e-6, 1.0)[0] is False


def test_only_the_three_largest_absorbers_count():
    W_dec = np.tile(LETTER, (6, 1))
    feature_acts = np.array([[0.0, 0.1, 0.1, 0.1, 0.1, 0.1]])
    found = absorption(LETTER[None], feature_acts, W_dec, np.zeros(D), LETTER, np.array([0]))
    assert found.fraction[0] == 0.0  # 0.3 of the projection; all five would make 0.5


def test_the_place_of_the_origin_does_not_matter():
    shift = 5 * LETTER - 2 * OTHER
    assert scored(0.25, 0.75, b_dec=shift) == scored(0.25, 0.75)


def test_the_length_of_a_decoder_row_does_not_matter():
    W_dec = np.stack([LETTER, LETTER])
    feature_acts = np.array([[0.25, 0.75]])
    plain = absorption(LETTER[None], feature_acts, W_dec, np.zeros(D), LETTER, np.array([0]))
    long = absorption(LETTER[None], feature_acts / 7, 7 * W_dec, np.zeros(D), LETTER, np.array([0]))
    np.testing.assert_allclose(plain.fraction, long.fraction)


def test_a_letter_of_two_features_is_split_and_one_of_one_is_not():
    rng = np.random.default_rng(0)
    is_letter = np.arange(400) < 200
    one = rng.random((400, 6)) * 0.1
    one[:200, 0] += 1
    two = rng.random((400, 6)) * 0.1
    two[:100, 0] += 1
    two[100:200, 1] += 1
    even = np.arange(400) % 2 == 0
    found = [
        split_set(c[even], is_letter[even], c[~even], is_letter[~even], f1_jump=0.03, max_split=10) for c in (one, two)
    ]
    assert found[0].features.tolist() == [0]
    assert sorted(found[1].features.tolist()) == [0, 1]
    assert found[1].f1_of_k[1] > found[1].f1_of_k[0] + 0.2


def test_words_are_single_tokens_with_a_space_before(tiny_model):
    words = single_token_words(tiny_model)
    assert {" the", " tower", " river"} <= {word.text for word in words}
    assert all(tiny_model.encode(word.text) == [word.token] for word in words)


def test_a_model_that_does_not_show_letters_gets_no_score(tiny_model, identity_sae):
    piece = first_letters(identity_sae, tiny_model, AbsorptionConfig(min_words=4), draws=20, seed=0)
    assert piece.scores == ()
    assert piece.skipped is not None
    assert "absorption.min_letters is 5" in piece.skipped


def test_absorption_runs_on_a_model(tiny_model, identity_sae):
    """Random weights keep a token's embedding, so that a lenient probe finds some letter."""
    config = AbsorptionConfig(min_words=4, min_letters=1, min_f1=0.01, examples=1)
    piece = first_letters(identity_sae, tiny_model, config, draws=50, seed=0)
    assert piece.skipped is None
    by_metric = {score.metric: score for score in piece.scores}
    assert 0 <= by_metric["absorption_full"].interval.value <= by_metric["absorption_fraction"].interval.high + 1
    assert by_metric["split_features"].interval.value >= 1
    assert "billion" in piece.notes[1]


@pytest.mark.parametrize("settings", [{"words": 0}, {"examples": -1}, {"min_words": 3}])
def test_impossible_settings_are_refused(settings: dict):
    with pytest.raises(ConfigError, match="absorption"):
        AbsorptionConfig(**settings)
