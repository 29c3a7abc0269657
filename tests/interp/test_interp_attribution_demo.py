"""The claim of attribution on the real model: its features carry the effect, random ones do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from saelab.interp.faithfulness import curves
from saelab.interp.traced_pairs import read_pairs, recoveries

WORKSPACE = Path(__file__).parents[2] / "runs" / "demo"
#: 22 pairs: subject and verb, facts, continuations. None was left out for what its features recover; pairs on which
#: the model's logit difference moves by less than 2 were, because they have no effect to be recovered.
PAIRS = Path(__file__).parent / "traced_pairs.jsonl"


@pytest.mark.demo
@pytest.mark.long
@pytest.mark.real
def test_top_features_recover_more_of_the_effect_than_random_ones(demo_model):
    """At every number of features, put in and taken out, with an interval above 0 from 8 on."""
    from saelab.models.load import load_model
    from saelab.sae.io import load_sae

    if not (WORKSPACE / "sae" / "DONE").exists():
        pytest.skip("runs/demo is not built; make demo builds it")
    model = load_model("demo", device="cpu", dtype="float32")
    found = recoveries(model, load_sae(WORKSPACE), read_pairs(PAIRS), draws=8)
    assert len(found) == 22
    assert all(recovery.effect > 2 for recovery in found)
    measured = curves(found)
    for points in (measured.faithfulness, measured.completeness):
        for point in points:
            print(point)
            assert point.attribution.value > point.random.value
            if point.n_features >= 8:
                assert point.over_random.low > 0
