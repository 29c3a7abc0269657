from __future__ import annotations

import numpy as np
import pytest
from test_interp_attribution import CORRUPT, METRIC, TEXT, perfect_sae, random_sae

from saelab.errors import ConfigError
from saelab.interp.attribution import attribute
from saelab.interp.faithfulness import Recovered, Recovery, curves, recovery


def made_up(effect: float, top: list[float], random: list[float]) -> Recovery:
    recovered = Recovered(np.array(top), np.array(random), np.array(top) / 2, effect)
    return Recovery(effect, recovered, recovered)


def test_all_features_of_an_sae_that_explains_everything_recover_the_whole_effect(tiny_model):
    sae = perfect_sae(tiny_model)
    found = attribute(tiny_model, sae, TEXT, METRIC, corrupt=CORRUPT)
    n = int(found.active.sum())
    recovered = recovery(tiny_model, sae, found, METRIC, counts=(n,), draws=2)
    assert recovered.effect == found.effect
    for kind in (recovered.faithfulness, recovered.completeness):
        for value in (*kind.attribution, *kind.random, *kind.largest, kind.all_features):
            assert value == pytest.approx(found.effect, abs=2e-3)


def test_what_is_put_in_is_what_the_features_write(tiny_model):
    """One feature, against an edit by hand, into the baseline and out of the text."""
    sae = random_sae(tiny_model)
    found = attribute(tiny_model, sae, TEXT, METRIC, corrupt=CORRUPT)
    recovered = recovery(tiny_model, sae, found, METRIC, counts=(1,), draws=1)
    (part,) = found.top(1, errors=False)
    ids = tiny_model.to_tokens(TEXT).ids
    for text, sign, kind, begin in (
        (CORRUPT, 1, recovered.faithfulness, found.baseline_value),
        (TEXT, -1, recovered.completeness, found.clean_value),
    ):
        acts = tiny_model.capture(tiny_model.to_tokens(text).ids, [found.hook_name])[found.hook_name]
        acts[0, part.position] += sign * (part.act - part.baseline_act) * sae.W_dec[part.feature].detach()
        with tiny_model.edit(found.hook_name, lambda old, keep, acts=acts: acts):
            value = float(METRIC(tiny_model.logits(ids)))
        assert kind.attribution[0] == pytest.approx(sign * (value - begin), abs=1e-3)


@pytest.mark.parametrize("baseline", [{"corrupt": CORRUPT}, {}])
def test_top_features_recover_more_than_random_ones(tiny_model, baseline):
    sae = perfect_sae(tiny_model)
    found = attribute(tiny_model, sae, TEXT, METRIC, **baseline)
    recovered = recovery(tiny_model, sae, found, METRIC, counts=(16,), draws=8)
    toward = np.sign(found.effect)
    for kind in (recovered.faithfulness, recovered.completeness):
        assert toward * kind.attribution[0] > toward * kind.random[0]


def test_random_features_are_drawn_from_the_active_ones_by_the_seed(tiny_model):
    sae = random_sae(tiny_model, k=4)
    found = attribute(tiny_model, sae, TEXT, METRIC)
    n_active = int((found.clean.feature_acts[1:] != 0).sum())
    assert int(found.active.sum()) == n_active == 4 * (len(found.tokens) - 1)
    first, again, other = (
        recovery(tiny_model, sae, found, METRIC, counts=(2,), draws=1, seed=seed).faithfulness for seed in (0, 0, 1)
    )
    assert first.random[0] == again.random[0] != other.random[0]
    assert first.attribution[0] == other.attribution[0]
    with pytest.raises(ConfigError, match=f"only {n_active} active features"):
        recovery(tiny_model, sae, found, METRIC, counts=(n_active + 1,))


def test_curves_are_ratios_of_sums_with_paired_differences():
    recoveries = [made_up(10.0, [5.0, 10.0], [1.0, 2.0]), made_up(2.0, [0.0, 2.0], [0.4, 1.0])]
    found = curves(recoveries, counts=(1, 8))
    assert found.n_texts == 2
    first, second = found.faithfulness
    assert (first.n_features, second.n_features) == (1, 8)
    assert first.attribution.value == pytest.approx(5 / 12)
    assert second.random.value == pytest.approx(3 / 12)
    assert second.over_random.value == pytest.approx(9 / 12)
    assert second.over_largest.value == pytest.approx(6 / 12)
    # both texts recover everything by 8 features, so resampling them changes nothing
    assert second.attribution.low == pytest.approx(1.0) == second.attribution.high
    assert found.all_features[0].value == pytest.approx(1.0)


def test_random_features_in_the_place_of_the_top_show_no_advantage():
    rng = np.random.default_rng(0)
    recoveries = [made_up(1.0, [float(a)], [float(b)]) for a, b in rng.normal(0.5, 0.2, size=(40, 2))]
    (point,) = curves(recoveries, counts=(8,)).faithfulness
    assert point.over_random.low < 0 < point.over_random.high


def test_mistakes_are_told(tiny_model):
    sae = random_sae(tiny_model)
    found = attribute(tiny_model, sae, TEXT, METRIC, steps=1)
    for wrong in ({"counts": ()}, {"counts": (0,)}, {"counts": (1,), "draws": 0}):
        with pytest.raises(ConfigError, match="at least 1"):
            recovery(tiny_model, sae, found, METRIC, **wrong)
    with pytest.raises(ConfigError, match="one sign"):
        curves([made_up(1.0, [1.0], [0.0]), made_up(-1.0, [1.0], [0.0])], counts=(1,))
    with pytest.raises(ConfigError, match="one sign"):
        curves([], counts=(1,))
