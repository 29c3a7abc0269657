from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from saelab.evals.steering_page import html, markdown
from saelab.evals.steering_page import to_json as report_of
from saelab.interp.dose import Dose, DoseCurve
from saelab.interp.steering_plot import dose_plot
from saelab.interp.steering_report import overall, overall_sentence, perplexity, verdict
from saelab.interp.steering_suite import FEATURE, Measured, SteeringSuite, Target, from_json, to_json

N = 20
NOISE = np.random.default_rng(0).normal(0, 0.3, N)
OTHER_NOISE = np.random.default_rng(1).normal(0, 0.3, N)


def dose(strength: float | None, kl: float, effects: np.ndarray, *, nats: float = 30.0) -> Dose:
    return Dose(strength, [kl] * N, {"7": effects.tolist()}, ["<b> text"] * N, [nats] * N, [10] * N)


def curve(slope: float, noise: np.ndarray = NOISE) -> DoseCurve:
    """An effect of ``slope * sqrt(KL)``, with each prompt off by its own share."""
    return DoseCurve(
        "made", [dose(s, kl, (slope + noise) * kl**0.5) for s, kl in ((0.2, 0.25), (0.4, 1.0), (0.6, 1.5))]
    )


def told(kl: float, effect: float, noise: np.ndarray = NOISE) -> DoseCurve:
    return DoseCurve("told", [dose(None, kl, effect + noise)])


def measured(slope: float, **curves: list[DoseCurve]) -> Measured:
    named = {name.replace("_", " "): group for name, group in curves.items()}
    return Measured(Target(7, (1,), (" a",), 1.0, (3,)), {FEATURE: [curve(slope)], **named}, 100, 900)


def test_the_best_baseline_that_beats_the_feature_wins():
    found = verdict(
        measured(2.0, probe=[curve(2.5)], mean_difference=[curve(3.0)], random_direction=[curve(0.0)]), kl=1.5
    )
    assert [c.verdict for c in found.comparisons] == ["baseline", "baseline", "feature"]
    assert found.winner == "mean difference"
    assert found.sentence().startswith("mean difference wins: the feature loses to probe (-0.61 nats")
    assert "beats random direction (+2.45 nats" in found.sentence()


def test_a_feature_wins_only_if_all_baselines_are_beaten():
    assert verdict(measured(2.0, probe=[curve(1.0)], random_feature=[curve(0.0)]), kl=1.5).winner == FEATURE
    found = verdict(measured(2.0, probe=[curve(2.0, OTHER_NOISE)], random_feature=[curve(0.0)]), kl=1.5)
    assert found.winner == "none"
    assert found.sentence().startswith("no clear winner: the feature is not told apart from probe")


def test_differences_are_paired_by_prompt():
    """Both are off by the same on each prompt, far more than they differ: the interval is of the difference alone."""
    loud = 10 * NOISE
    pair = Measured(Target(7, (1,), (" a",), 1.0, ()), {FEATURE: [curve(2.0, loud)], "probe": [curve(1.9, loud)]}, 1, 1)
    (found,) = verdict(pair, kl=1.0).comparisons
    assert found.difference.low == pytest.approx(0.1)
    assert found.difference.high == pytest.approx(0.1)


def test_an_instruction_is_compared_at_the_kl_that_it_costs():
    """At a KL of 0.25 the feature does 1 nat, at 1.5 it does 2.4: an instruction of 1.2 nats for 0.25 wins."""
    found = verdict(measured(2.0, prompt=[told(0.25, 1.2, NOISE / 2)]), kl=1.5)
    (comparison,) = found.comparisons
    assert comparison.kl == 0.25
    assert comparison.feature_effect == pytest.approx(float((2.0 + NOISE).mean() / 2))
    assert comparison.difference.value == pytest.approx(-0.2)
    assert found.winner == "prompt"


def test_an_instruction_that_costs_more_than_any_dose_is_not_compared():
    found = verdict(measured(2.0, prompt=[told(4.0, 9.0)], probe=[curve(1.0)]), kl=1.5)
    assert [c.verdict for c in found.comparisons] == ["not comparable", "feature"]
    assert found.comparisons[0].difference is None
    assert "was not pushed as far as prompt" in found.sentence()
    assert [row.baseline for row in overall([found])] == ["probe"]


def test_random_directions_count_by_their_mean():
    (found,) = verdict(measured(2.0, random_direction=[curve(1.0), curve(-3.0)]), kl=1.0).comparisons
    assert found.baseline_effect == pytest.approx(float((-1.0 + NOISE).mean()))


def test_over_features_the_worst_baseline_comes_first_and_is_named():
    verdicts = [
        verdict(
            measured(slope, probe=[curve(slope + 1)], random_direction=[curve(0.0)], twin=[curve(2.5, OTHER_NOISE)]),
            kl=1.5,
        )
        for slope in (1.0, 1.5, 2.0, 3.0, 3.5, 4.0)
    ]
    rows = overall(verdicts)
    assert [row.baseline for row in rows] == ["probe", "twin", "random direction"]
    assert (rows[0].wins, rows[0].ties, rows[0].losses) == (0, 0, 6)
    assert overall_sentence(rows) == (
        "probe wins against the features at equal KL; twin and the features are not told apart; "
        "the features win against random direction."
    )


def test_a_few_features_are_counted_and_not_judged():
    verdicts = [verdict(measured(slope, probe=[curve(slope + 1)]), kl=1.5) for slope in (1.0, 2.0, 3.0)]
    assert overall_sentence(overall(verdicts)).endswith("they win 0, tie 0 and lose 3 against probe.")


def test_a_single_feature_keeps_its_interval_over_prompts():
    found = verdict(measured(2.0, probe=[curve(2.05, OTHER_NOISE)]), kl=1.0)
    (row,) = overall([found])
    assert row.difference == found.comparisons[0].difference
    assert row.difference.low < row.difference.value < row.difference.high


def test_perplexity_is_a_ratio_of_sums():
    long, short = dose(0.1, 1.0, NOISE, nats=20.0), dose(0.1, 1.0, NOISE, nats=40.0)._replace(n_tokens=[5] * N)
    assert perplexity([long, short]).value == pytest.approx(np.exp(60 / 15))


def test_a_curve_survives_its_json():
    assert from_json(to_json(curve(1.0))) == curve(1.0)


@pytest.fixture
def result() -> dict:
    suite = SteeringSuite(dose(None, 0.0, NOISE), [measured(2.0, probe=[curve(3.0)], prompt=[told(0.3, 0.1)])])
    return {"n_prompts": N, "baselines": report_of(suite, {7: 'fires on "<script>" | pipes'}, kl=1.5, seed=0)}


def test_the_report_says_plainly_who_wins(result):
    for text in (markdown(result), html(result)):
        assert "probe wins against the features at equal KL; the features win against prompt." in text
        assert "Probe wins: the feature loses to probe (-1.22 nats, -1.22 to -1.22, at a KL of 1.50)" in text


def test_the_page_does_no_harm_with_tokens_that_are_markup(result):
    page = html(result)
    assert "<script>" not in page
    assert "<b> text" not in page


def test_the_picture_shows_every_method_with_what_it_cost(result):
    points = verdict(measured(2.0, probe=[curve(3.0)], prompt=[told(0.3, 0.1)]), kl=1.5).points
    svg = ET.fromstring(dose_plot(points, unsteered_perplexity=20.0))
    assert len(svg.findall("circle")) == 2 * 7 + 3  # each dose in both panels, and the legend
    assert len(svg.findall("polyline")) == 2 * 2  # an instruction has no line
    assert [text.text for text in svg.findall("text")][-3:] == [FEATURE, "probe", "prompt"]
