from __future__ import annotations

import math

import pytest
import torch
from gpt2_for_tests import random_gpt2

from saelab.errors import ConfigError, ShapeError
from saelab.interp.lens import feature_lens, logit_lens
from saelab.interp.tuned_lens import Translator, TunedLens
from saelab.interp.unembedding import Unembedding, lens_kl, residual_hooks, token_blocks
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata
from saelab.sae.topk import TopKConfig

TEXT = "the river and the sea, north of the old tower"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return random_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tiny_model, gpt2):
    return {"llama": tiny_model, "gpt2": gpt2}[request.param]


def sae_at(model, hook: str, *, seed: int = 0):
    sae = new_sae(TopKConfig(d_sae=64, k=4), d_in=model.hook_width(hook), generator=torch.Generator().manual_seed(seed))
    sae.metadata = Metadata(model_name="tiny", hook_name=hook)
    return sae


def test_the_last_layer_is_the_model_itself(model):
    unembedding = Unembedding(model)
    ids = model.to_tokens(TEXT).ids
    resid = model.capture(ids, [unembedding.last_hook])[unembedding.last_hook]
    torch.testing.assert_close(unembedding.logits(resid), model.logits(ids), rtol=1e-4, atol=1e-5)
    reading = logit_lens(model, TEXT)
    torch.testing.assert_close(reading.kl[-1], torch.zeros(ids.shape[1]), rtol=0, atol=1e-5)
    assert reading.top_ids[-1, :, 0].tolist() == model.logits(ids)[0].argmax(-1).tolist()


def test_the_lens_is_norm_and_unembedding_by_hand(model):
    """float64 arithmetic on the raw weights, against the model's own modules."""
    hook = "blocks.0.hook_resid_post"
    ids = model.to_tokens(TEXT).ids
    x = model.capture(ids, [hook])[hook][0].double()
    norm = model.bridge.ln_final.original_component
    if isinstance(norm, torch.nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    normed = x / (x.square().mean(-1, keepdim=True) + getattr(norm, "eps", 1e-6)).sqrt() * norm.weight.double()
    bias = getattr(norm, "bias", None)
    normed = normed if bias is None else normed + bias.double()
    logps = (normed @ model.unembed.double()).log_softmax(-1)
    reading = logit_lens(model, TEXT, top=3)
    row = reading.hook_names.index(hook)
    best = logps.topk(3)
    assert reading.top_ids[row].tolist() == best.indices.tolist()
    torch.testing.assert_close(reading.top_probs[row].double(), best.values.exp(), rtol=1e-4, atol=1e-6)
    following = logps[:-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(reading.next_logps[row, :-1].double(), following, rtol=1e-4, atol=1e-4)
    own = model.logits(ids)[0].double().log_softmax(-1)
    torch.testing.assert_close(reading.kl[row].double(), (own.exp() * (own - logps)).sum(-1), rtol=1e-4, atol=1e-5)


def test_a_reading_has_every_layer_and_every_token(model):
    reading = logit_lens(model, TEXT)
    assert reading.hook_names == tuple(residual_hooks(model))
    assert len(reading.hook_names) == model.n_layers + 1
    assert reading.kl.shape == (model.n_layers + 1, len(reading.tokens))
    assert reading.kl.min() > -1e-5
    assert math.isnan(reading.next_logps[0, -1])
    plain = reading.to_json()
    assert plain["cells"][0][-1]["next_logp"] is None
    assert plain["cells"][0][0]["next_logp"] == pytest.approx(float(reading.next_logps[0, 0]))
    prediction = reading.top("blocks.0.resid_post", -1)[0]
    assert plain["cells"][1][-1]["top"][0] == {"token": prediction.token, "probability": prediction.probability}


def test_a_text_longer_than_a_block_reads_the_same(tiny_model, monkeypatch):
    whole = logit_lens(tiny_model, TEXT)
    monkeypatch.setattr("saelab.interp.unembedding._BLOCK_LOGITS", 3 * tiny_model.d_vocab)
    parts = logit_lens(tiny_model, TEXT)
    torch.testing.assert_close(parts.kl, whole.kl, rtol=1e-4, atol=1e-6)
    assert torch.equal(parts.top_ids, whole.top_ids)


def test_blocks_cover_each_token_once():
    assert [list(range(10))[block] for block in token_blocks(10, 1 << 22)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(token_blocks(2, 1 << 30)) == [slice(0, 1), slice(1, 2)]


def test_an_untrained_tuned_lens_is_the_logit_lens(model):
    tuned = logit_lens(model, TEXT, tuned=TunedLens.identity(model))
    plain = logit_lens(model, TEXT)
    torch.testing.assert_close(tuned.kl, plain.kl, rtol=0, atol=1e-6)
    assert (tuned.kind, plain.kind) == ("tuned lens", "logit lens")


def test_a_translator_acts_before_the_unembedding(tiny_model):
    """A translator that swaps two layers' difference in: here, a constant that makes every token say the same."""
    lens = TunedLens.identity(tiny_model)
    hook = "blocks.1.hook_resid_post"
    width = tiny_model.d_model
    constant = torch.randn(width, generator=torch.Generator().manual_seed(0))
    translators = dict(lens.translators) | {hook: Translator(-torch.eye(width), constant)}
    lens = TunedLens(translators, lens.model_name, lens.model_sha256)
    reading = logit_lens(tiny_model, TEXT, tuned=lens)
    expected = int(Unembedding(tiny_model).logits(constant[None]).argmax())
    assert set(reading.top_ids[reading.hook_names.index(hook), :, 0].tolist()) == {expected}


def test_what_one_block_leaves_is_what_the_next_one_meets(tiny_model):
    lens = TunedLens.identity(tiny_model)
    assert lens.translator("blocks.2.hook_resid_pre") is lens.translator("blocks.1.resid_post")
    with pytest.raises(ConfigError, match=r"no translator for blocks\.1\.hook_resid_mid"):
        lens.translator("blocks.1.hook_resid_mid")


def test_active_edits_show_in_the_reading(tiny_model):
    before = logit_lens(tiny_model, TEXT)
    with tiny_model.edit("blocks.0.hook_resid_post", lambda acts, keep: acts + 1.0):
        edited = logit_lens(tiny_model, TEXT)
    after = logit_lens(tiny_model, TEXT)
    assert not torch.allclose(edited.kl[1], before.kl[1])
    assert torch.equal(after.kl, before.kl)


def test_kl_of_two_distributions_by_hand():
    logps = torch.tensor([[0.5, 0.5]]).log()
    lens_logits = torch.tensor([[0.25, 0.75]]).log() + 3.0  # a constant that softmax does not see
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert float(lens_kl(logps, lens_logits)) == pytest.approx(expected, abs=1e-6)
    assert float(lens_kl(logps, logps)) == pytest.approx(0.0, abs=1e-7)


def test_the_frozen_norm_is_the_norm_and_linear(model):
    unembedding = Unembedding(model)
    generator = torch.Generator().manual_seed(1)
    x = 5 * torch.randn(model.d_model, generator=generator) + 2
    norm = unembedding.frozen_norm(x)
    torch.testing.assert_close(norm(x) + norm.bias, unembedding.normed(x[None])[0], rtol=1e-4, atol=1e-4)
    part = torch.randn(model.d_model, generator=generator)
    torch.testing.assert_close(norm(part) + norm(x - part), norm(x), rtol=1e-4, atol=1e-4)
    assert norm.centred == isinstance(model.bridge.ln_final.original_component, torch.nn.LayerNorm)
    torch.testing.assert_close(norm.gain, model.final_norm_scale())


def test_a_model_that_makes_its_logits_otherwise_is_refused(tiny_model, monkeypatch):
    monkeypatch.setattr(
        type(tiny_model.bridge.adapter), "apply_output_logits_transform", lambda self, logits: 0.5 * logits
    )
    with pytest.raises(ConfigError, match="lenses do not apply"):
        Unembedding(tiny_model)


def test_an_architectures_own_transform_of_the_logits_counts(tiny_model, monkeypatch):
    """As Gemma's soft cap: the model applies it, so the lens does."""

    def capped(logits):
        return 2.0 * torch.tanh(logits / 2.0)

    logits = type(tiny_model).logits
    monkeypatch.setattr(type(tiny_model), "logits", lambda self, *a, **k: capped(logits(self, *a, **k)))
    monkeypatch.setattr(type(tiny_model.bridge.adapter), "apply_output_logits_transform", lambda self, z: capped(z))
    reading = logit_lens(tiny_model, TEXT)
    own = tiny_model.logits(tiny_model.to_tokens(TEXT).ids)[0].softmax(-1)
    torch.testing.assert_close(reading.top_probs[-1, :, 0], own.amax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"hook_names": ["blocks.9.hook_resid_post"]}, ConfigError, "has no hook"),
        ({"hook_names": ["blocks.1.hook_mlp_out"]}, ConfigError, "is not the residual stream"),
        ({"top": 0}, ConfigError, "top must be at least 1"),
    ],
)
def test_a_reading_that_means_nothing_is_refused(tiny_model, arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        logit_lens(tiny_model, TEXT, **arguments)


def test_a_cell_that_is_not_there_is_refused(tiny_model):
    reading = logit_lens(tiny_model, TEXT, hook_names=["blocks.1.hook_resid_post"])
    with pytest.raises(ConfigError, match="has not read"):
        reading.top("blocks.0.hook_resid_post", 0)
    with pytest.raises(ShapeError, match="there is no token 99"):
        reading.top("blocks.1.hook_resid_post", 99)


def test_a_feature_that_points_at_a_token_promotes_it(model):
    hook = "blocks.0.hook_resid_post"
    sae = sae_at(model, hook)
    gain = Unembedding(model).unit_norm().gain
    target = int(model.unembed.norm(dim=0).argmax())
    with torch.no_grad():
        sae.W_dec[3] = torch.nn.functional.normalize(model.unembed[:, target] * gain, dim=0)
    found, other = feature_lens(model, sae, [3, 4])
    assert found.feature == 3
    assert found.promoted[0].token == model.str_tokens([target])[0]
    assert found.z > found.noise_z > 0
    assert other.z < 1.3 * other.noise_z
    assert found.promoted[0].effect > 0 > found.suppressed[0].effect


def test_the_feature_lens_is_the_derivative_of_the_logits(model):
    """At a residual of root mean square 1 that the direction is orthogonal to, nothing is left out."""
    hook = "blocks.1.hook_resid_post"
    sae = sae_at(model, hook)
    unembedding = Unembedding(model)
    x = torch.ones(model.d_model)
    x[1::2] = -1
    direction = sae.feature(5).direction
    direction = direction - (direction @ x) / (x @ x) * x
    with torch.no_grad():
        sae.W_dec[5] = direction
    h = 1e-2
    slope = (unembedding.logits(x + h * direction) - unembedding.logits(x - h * direction)) / (2 * h)
    slope = slope - slope.mean()
    found = feature_lens(model, sae, [5], top=4)[0]
    values = torch.tensor([effect.effect for effect in found.promoted])
    torch.testing.assert_close(values, slope.topk(4).values, rtol=1e-2, atol=1e-2)


def test_the_feature_lens_agrees_with_the_index(tiny_model):
    from saelab.features.logits import logit_table

    sae = sae_at(tiny_model, "blocks.1.hook_resid_post")
    found = feature_lens(tiny_model, sae, [0, 7], top=6)
    table = logit_table(sae.W_dec.detach()[[0, 7]], tiny_model.unembed, tiny_model.final_norm_scale(), n=6)
    for row, one in enumerate(found):
        assert [e.token for e in one.promoted] == tiny_model.str_tokens(table.promoted_ids[row].tolist())
        assert [e.effect for e in one.suppressed] == pytest.approx(table.suppressed_effects[row].tolist(), abs=1e-4)
        assert one.z == pytest.approx(float(table.z[row]), abs=1e-3)
    assert found[0].noise_z == pytest.approx(table.noise_z, abs=1e-3)


def test_features_are_translated_too(tiny_model):
    """With a translator that exchanges two features' directions, their tokens are exchanged."""
    hook = "blocks.0.hook_resid_post"
    sae = sae_at(tiny_model, hook)
    a, b = torch.eye(tiny_model.d_model)[:2]
    with torch.no_grad():
        sae.W_dec[0], sae.W_dec[1] = a, b
    exchange = torch.eye(tiny_model.d_model)
    exchange[:2, :2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    lens = TunedLens.identity(tiny_model)
    swapped = Translator(exchange - torch.eye(tiny_model.d_model), torch.ones(tiny_model.d_model))
    lens = TunedLens(dict(lens.translators) | {hook: swapped}, lens.model_name, lens.model_sha256)
    plain = feature_lens(tiny_model, sae, [0, 1])
    tuned = feature_lens(tiny_model, sae, [0, 1], tuned=lens)
    assert [one.promoted for one in tuned] == [one.promoted for one in reversed(plain)]


def test_features_that_do_not_write_to_the_stream_are_refused(tiny_model):
    with pytest.raises(ConfigError, match="does not write to the residual stream"):
        feature_lens(tiny_model, sae_at(tiny_model, "blocks.0.attn.hook_q"), [0])
    with pytest.raises(ShapeError, match="there is no feature 64"):
        feature_lens(tiny_model, sae_at(tiny_model, "blocks.0.hook_mlp_out"), [64])
