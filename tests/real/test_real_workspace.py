"""The claims of the README on the demo workspace: real model, real text. Build it first: make demo SERVE=0."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKSPACE = Path(__file__).parents[2] / "runs" / "demo"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not (WORKSPACE / "index" / "DONE").exists(), reason="runs/demo is not built; make demo SERVE=0"),
]


def verb(*arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "saelab", *map(str, arguments), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model():
    import saelab as sl

    return sl.load_model("smollm2-135m-instruct")


def test_the_hooked_model_equals_the_plain_one(model):
    from saelab.models.load import check_fidelity

    assert check_fidelity(model) == 0.0


def test_the_sae_is_faithful_on_fifty_thousand_held_out_tokens(tmp_path: Path):
    result = verb("eval", WORKSPACE, "--tokens", 50_000, "--out", tmp_path / "eval")
    metrics = {name: part["value"] for name, part in result["metrics"].items()}
    print(json.dumps(result["metrics"], indent=1))
    assert result["n_tokens"] >= 50_000
    assert metrics["explained_variance"] >= 0.80
    assert metrics["l0"] <= 32
    assert metrics["ce_recovered"] >= 0.97
    assert metrics["dead_fraction"] <= 0.05


def test_steering_beats_random_directions_at_equal_cost(tmp_path: Path):
    result = verb("steer", WORKSPACE, "--record", 10, "--kl", 1.5, "--out", tmp_path / "steer")
    for feature in result["features"]:
        print(
            f"{feature['feature']:5d} {feature['label']:40s} strength {feature['strength']:.2f} KL {feature['kl']:.2f} "
            f"rise {feature['rise']:+.2f} random {feature['random_rise']:+.2f} advantage {feature['advantage']:+.2f}"
        )
    print("mean advantage", result["advantage"])
    assert len(result["features"]) == 10
    assert result["n_prompts"] == 20
    assert len(result["random_strengths"]) == 20
    assert all(feature["kl"] == pytest.approx(1.5, rel=0.011) for feature in result["features"])
    assert result["advantage"]["value"] >= 1.0
    assert result["advantage"]["low"] > 0


def test_steering_leaves_the_real_model_as_it_was(model):
    import saelab as sl

    sae = sl.load_sae(WORKSPACE)
    tokens = model.to_tokens("The tower was built of")
    before = model.logits(tokens.ids)
    with sl.steer(model, sae.feature(7), strength=0.6):
        assert not torch.equal(model.logits(tokens.ids), before)
    with pytest.raises(RuntimeError), sl.steer(model, sae.feature(7), strength=0.6):
        raise RuntimeError("stop")
    assert torch.equal(model.logits(tokens.ids), before)
    assert not [name for name, point in model.bridge.hook_dict.items() if point.fwd_hooks]


def test_searching_by_text_finds_a_feature_by_what_it_fires_on(model):
    """The top example of a token-specific feature, typed in, brings that feature back."""
    import saelab as sl

    sae, index = sl.load_sae(WORKSPACE), sl.load_index(WORKSPACE)
    found = 0
    for feature in index.most_token_specific(10):
        example = index.feature(feature).top_examples[0]
        text = "".join(example.tokens[max(0, example.peak - 8) : example.peak + 1])
        found += feature in [hit.feature for hit in sl.features_in_text(model, sae, index, text, n=32)]
    assert found >= 8
