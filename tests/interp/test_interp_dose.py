from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saelab.errors import ConfigError
from saelab.interp.dose import (
    Dose,
    DoseConfig,
    DoseCurve,
    Ground,
    dose_curve,
    effects_at,
    instructed,
    surprisals,
    token_logp,
    unsteered,
)
from saelab.interp.steering import add_direction

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ("The cat sat", "Once upon a time there", "Hello")
KLS = (0.02, 0.08)
TOKEN = 50


@pytest.fixture(scope="module")
def ground(tiny_model) -> Ground:
    return Ground(tiny_model, DoseConfig(kls=KLS, prompts=PROMPTS, max_new_tokens=5, seed=3))


def towards(model, token: int):
    direction = model.unembed[:, token].float()
    return lambda strength: add_direction(HOOK, direction, strength=strength, mean_norm=1.0)


@pytest.fixture(scope="module")
def curve(ground) -> DoseCurve:
    return dose_curve(ground, "pointed", towards(ground.model, TOKEN), {"raised": token_logp([TOKEN])})


def test_a_curve_is_measured_at_the_kls_asked_for(curve):
    assert [dose.kl for dose in curve.doses] == pytest.approx(KLS, rel=0.021)
    strengths = [dose.strength for dose in curve.doses]
    assert strengths == sorted(strengths)


def test_a_direction_towards_a_token_raises_it_more_with_the_dose(curve):
    small, large = (np.mean(dose.effects["raised"]) for dose in curve.doses)
    assert 0.1 < small < large


def test_each_number_of_a_dose_is_of_its_own_prompt(ground, curve):
    """Measured again prompt by prompt, from logits."""
    dose, model = curve.doses[-1], ground.model
    for row, prompt in enumerate(PROMPTS):
        ids = model.to_tokens(prompt).ids
        clean = model.logits(ids)[0, -1].log_softmax(-1)
        edit = towards(model, TOKEN)(dose.strength)
        with model.edit(HOOK, lambda acts, keep, edit=edit: acts + edit.delta(acts)):
            edited = model.logits(ids)[0, -1].log_softmax(-1)
        assert dose.kls[row] == pytest.approx(float((clean.exp() * (clean - edited)).sum()), rel=0.05, abs=1e-4)
        assert dose.effects["raised"][row] == pytest.approx(float((edited - clean)[TOKEN]), rel=0.05, abs=1e-2)


def test_nothing_costs_nothing(ground):
    dose = unsteered(ground)
    assert dose.kls == pytest.approx([0, 0, 0], abs=1e-6)
    assert dose.effects == {}
    assert dose.texts == ground.model.generate_batch(list(PROMPTS), max_new_tokens=5, temperature=1.0, seed=3)


def test_a_text_costs_the_sum_of_its_tokens_surprisals(tiny_model):
    texts = [" on the mat", "", " again and"]
    found = surprisals(tiny_model, PROMPTS, texts)
    for prompt, text, nats, n_tokens in zip(PROMPTS, texts, found.nats, found.n_tokens, strict=True):
        before, after = tiny_model.to_tokens(prompt).ids[0].tolist(), tiny_model.encode(text)
        logps = tiny_model.logits(torch.tensor([before + after]))[0].log_softmax(-1)
        expected = sum(float(logps[len(before) - 1 + place, token]) for place, token in enumerate(after))
        assert n_tokens == len(after)
        assert nats == pytest.approx(-expected, rel=0.01, abs=1e-6)


def test_written_text_is_judged_by_the_unsteered_model(ground, curve):
    dose = curve.doses[-1]
    again = surprisals(ground.model, PROMPTS, dose.texts)
    assert dose.surprisals == pytest.approx(again.nats, rel=1e-6)
    assert dose.perplexity == pytest.approx(math.exp(sum(again.nats) / sum(again.n_tokens)))


def test_an_instruction_is_read_before_the_prompt_and_judged_without_it(ground):
    found = instructed(ground, "asked", "Say cat. ", {"raised": token_logp([TOKEN])})
    (dose,) = found.doses
    model = ground.model
    clean, told = (
        model.logits(model.to_tokens(text).ids)[0, -1].log_softmax(-1) for text in ("Hello", "Say cat. Hello")
    )
    assert dose.strength is None
    assert dose.effects["raised"][2] == pytest.approx(float((told - clean)[TOKEN]), rel=0.05, abs=1e-2)
    assert dose.surprisals == pytest.approx(surprisals(model, PROMPTS, dose.texts).nats, rel=1e-6)


def made(kls: list[float], effects: list[list[float]]) -> DoseCurve:
    doses = [
        Dose(1.0, [kl, kl], {"m": effect}, ["", ""], [0.0, 0.0], [0, 0])
        for kl, effect in zip(kls, effects, strict=True)
    ]
    return DoseCurve("made", doses)


def test_between_doses_effects_go_straight_over_the_root_of_the_kl():
    curve = made([0.25, 1.0], [[1.0, -2.0], [2.0, 0.0]])
    assert effects_at(curve, "m", 0.25).tolist() == [1.0, -2.0]
    assert effects_at(curve, "m", 0.0625).tolist() == pytest.approx([0.5, -1.0])  # a quarter on the way from nothing
    assert effects_at(curve, "m", 0.5625).tolist() == pytest.approx([1.5, -1.0])
    assert effects_at(curve, "m", 1.01).tolist() == [2.0, 0.0]
    assert effects_at(curve, "m", 1.2) is None


def test_no_text_has_no_perplexity():
    assert math.isnan(made([1.0], [[0.0, 0.0]]).doses[0].perplexity)


@pytest.mark.parametrize("kls", [(), (0.0, 1.0), (1.0, 0.5), (0.5, 0.5)])
def test_doses_are_ascending_and_above_nothing(kls):
    with pytest.raises(ConfigError, match="ascending order"):
        DoseConfig(kls=kls)


def test_one_prompt_has_no_interval():
    with pytest.raises(ConfigError, match="at least two prompts"):
        DoseConfig(prompts=("alone",))
