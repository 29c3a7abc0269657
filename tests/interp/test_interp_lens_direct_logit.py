from __future__ import annotations

import pytest
import torch
from gpt2_for_tests import random_gpt2

from saelab.errors import ConfigError, ShapeError, TextError
from saelab.interp.direct_logit import direct_logit_attribution
from saelab.models.load import load_model
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata, Source
from saelab.sae.topk import TopKConfig

TEXT = "the river and the sea"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return random_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tiny_model, gpt2):
    return {"llama": tiny_model, "gpt2": gpt2}[request.param]


def sae_at(model, hook: str):
    sae = new_sae(TopKConfig(d_sae=64, k=4), d_in=model.hook_width(hook), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.b_dec.normal_(generator=torch.Generator().manual_seed(1))
    sae.metadata = Metadata(model_name="tiny", hook_name=hook)
    return sae


def rounding(found) -> float:
    return abs(next(part.value for part in found.parts if part.kind == "rounding"))


HOOKS = [
    None,
    "blocks.1.hook_resid_pre",
    "blocks.0.hook_resid_mid",
    "blocks.0.hook_resid_post",
    "blocks.1.hook_mlp_out",
]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("wrong", [None, " sea"])
def test_the_parts_add_up_to_the_logit(model, hook, heads, wrong):
    sae = None if hook is None else sae_at(model, hook)
    for position in (0, 2, -1):
        found = direct_logit_attribution(
            model, TEXT, answer=" river", wrong=wrong, position=position, heads=heads, sae=sae
        )
        logits = model.logits(model.to_tokens(TEXT).ids)[0, position]
        ours, theirs = model.encode(" river")[0], model.encode(" sea")[0]
        expected = float(logits[ours] - (logits[theirs] if wrong else 0))
        assert found.logit == pytest.approx(expected, abs=1e-4)
        assert sum(part.value for part in found.parts) == pytest.approx(found.logit, abs=1e-9)
        assert rounding(found) < 1e-3  # nothing is swept under this rug


def test_a_part_is_what_the_logit_loses_with_the_norm_held(model):
    """By hand: leave one MLP's output out of the residual stream, keep the division as it was."""
    ids = model.to_tokens(TEXT).ids
    last = f"blocks.{model.n_layers - 1}.hook_resid_post"
    acts = {hook: x[0, -1].double() for hook, x in model.capture(ids, ["blocks.0.hook_mlp_out", last]).items()}
    norm = model.bridge.ln_final.original_component
    layer_norm = isinstance(norm, torch.nn.LayerNorm)
    resid, without = acts[last], acts[last] - acts["blocks.0.hook_mlp_out"]
    centred = [x - x.mean() if layer_norm else x for x in (resid, without)]
    scale = (centred[0].square().mean() + getattr(norm, "eps", 1e-6)).sqrt()
    token = model.encode(" river")[0]
    logits = [float((x / scale * norm.weight.double()) @ model.unembed[:, token].double()) for x in centred]
    found = direct_logit_attribution(model, TEXT, answer=token)
    part = next(p for p in found.parts if p.kind == "mlp" and p.layer == 0)
    assert part.value == pytest.approx(logits[0] - logits[1], abs=1e-4)
    assert found.scale == pytest.approx(float(scale), rel=1e-4)


def test_heads_and_their_bias_make_the_attention_output(model):
    whole = direct_logit_attribution(model, TEXT, answer=" river")
    heads = direct_logit_attribution(model, TEXT, answer=" river", heads=True)
    for layer in range(model.n_layers):
        attention = sum(p.value for p in whole.parts if p.kind == "attention" and p.layer == layer)
        split = [p for p in heads.parts if p.kind in ("head", "attention") and p.layer == layer]
        assert [p.number for p in split] == [0, 1, None]
        assert sum(p.value for p in split) == pytest.approx(attention, abs=1e-4)
        bias = getattr(model.bridge.blocks[layer].attn, "b_O", None)
        if bias is None:
            assert split[-1].value == pytest.approx(0, abs=1e-4)
        else:
            assert abs(split[-1].value) > 1e-3


def test_features_bias_and_error_make_what_their_hook_holds(model):
    hook = "blocks.0.hook_resid_post"
    sae = sae_at(model, hook)
    whole = direct_logit_attribution(model, TEXT, answer=" river")
    divided = direct_logit_attribution(model, TEXT, answer=" river", sae=sae)
    early = sum(p.value for p in whole.parts if p.kind == "embedding" or p.layer == 0)
    kinds = ("feature", "sae_bias", "error")
    inside = [p for p in divided.parts if p.kind in kinds]
    assert sum(p.value for p in inside) == pytest.approx(early, abs=1e-4)
    assert [p.kind for p in inside] == ["feature"] * 4 + ["sae_bias", "error"]
    acts = model.capture(model.to_tokens(TEXT).ids, [hook])[hook][0, -1]
    assert sorted(p.number for p in inside if p.kind == "feature") == sae.encode(acts).nonzero()[:, 0].tolist()
    before, after = ([p for p in found.parts if p.layer not in (None, 0)] for found in (whole, divided))
    assert [p.name for p in after] == [p.name for p in before]
    assert [p.value for p in after] == pytest.approx([p.value for p in before], abs=1e-5)


def test_what_moves_all_logits_alike_cancels_in_a_difference(tiny_model):
    """The difference of two attributions is the attribution of the difference, part by part."""
    ours = direct_logit_attribution(tiny_model, TEXT, answer=" river")
    theirs = direct_logit_attribution(tiny_model, TEXT, answer=" sea")
    both = direct_logit_attribution(tiny_model, TEXT, answer=" river", wrong=" sea")
    for a, b, difference in zip(ours.parts, theirs.parts, both.parts, strict=True):
        assert difference.value == pytest.approx(a.value - b.value, abs=1e-4)


def test_rounding_has_a_part_of_its_own(tiny_model_dir):
    """In bfloat16 the stream is rounded at every addition; the sum stays exact, and the rest is named."""
    model = load_model(tiny_model_dir, device="cpu", dtype="bfloat16")
    found = direct_logit_attribution(model, TEXT, answer=" river", heads=True)
    assert sum(part.value for part in found.parts) == pytest.approx(found.logit, abs=1e-9)
    assert 0 < rounding(found) < 0.3


def test_without_an_answer_the_prediction_is_divided(tiny_model):
    found = direct_logit_attribution(tiny_model, TEXT)
    logits = tiny_model.logits(tiny_model.to_tokens(TEXT).ids)[0, -1]
    assert found.answer == tiny_model.str_tokens([int(logits.argmax())])[0]
    strongest = found.strongest(3)
    assert abs(strongest[0].value) == max(abs(part.value) for part in found.parts)
    plain = found.to_json()
    assert plain["parts"][0]["name"] == "embedding"
    assert plain["position"] == len(found.tokens) - 1


def test_names_say_what_a_part_is(gpt2):
    found = direct_logit_attribution(gpt2, TEXT, heads=True, sae=sae_at(gpt2, "blocks.0.hook_mlp_out"))
    names = [part.name for part in found.parts]
    assert names[:4] == ["embedding", "head 0.0", "head 0.1", "attn 0"]
    assert names[-4:] == ["attn 1", "mlp 1", "bias", "rounding"]
    assert {"SAE bias 0", "SAE error 0"} <= set(names)


def test_components_that_do_not_add_up_are_refused(tiny_model):
    with (
        tiny_model.edit("blocks.1.hook_resid_post", lambda acts, keep: 2 * acts),
        pytest.raises(ConfigError, match="do not add up"),
    ):
        direct_logit_attribution(tiny_model, TEXT)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"answer": " river king"}, TextError, "must be one token"),
        ({"answer": 99999}, ShapeError, "there is no token 99999"),
        ({"answer": " sea", "wrong": " sea"}, ConfigError, "their difference is 0"),
        ({"position": 40}, ShapeError, "there is no token 40"),
    ],
)
def test_a_logit_that_is_not_there_is_refused(tiny_model, arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        direct_logit_attribution(tiny_model, TEXT, **arguments)


def test_an_sae_with_no_place_in_the_sum_is_refused(tiny_model):
    with pytest.raises(ConfigError, match="no direct part in a logit"):
        direct_logit_attribution(tiny_model, TEXT, sae=sae_at(tiny_model, "blocks.0.attn.hook_z"))
    transcoder = sae_at(tiny_model, "blocks.0.hook_mlp_out")
    sources = tuple(Source(hook_name=f"blocks.0.{place}") for place in ("mlp.hook_in", "hook_mlp_out"))
    transcoder.metadata = Metadata(model_name="tiny", hook_name="blocks.0.hook_mlp_out", sources=sources)
    with pytest.raises(ConfigError, match="does not reconstruct the one hook"):
        direct_logit_attribution(tiny_model, TEXT, sae=transcoder)
