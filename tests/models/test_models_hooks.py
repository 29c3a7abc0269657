"""Hook names: one spelling, real ones only, and the nearest ones when a name is wrong."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError
from saelab.models.hooks import canonical_hook_name, layer_of


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("blocks.10.hook_resid_post", "blocks.10.hook_resid_post"),
        ("blocks.10.hook_out", "blocks.10.hook_resid_post"),
        ("blocks.10.resid_post", "blocks.10.hook_resid_post"),
        ("blocks.0.hook_in", "blocks.0.hook_resid_pre"),
        ("blocks.3.attn.o.hook_in", "blocks.3.attn.hook_z"),
        ("blocks.3.mlp_out", "blocks.3.hook_mlp_out"),
        ("embed.hook_out", "hook_embed"),
        ("blocks.1.mlp.hook_post", "blocks.1.mlp.hook_post"),
        ("resid_post", "resid_post"),
        ("nonsense", "nonsense"),
    ],
)
def test_each_place_has_one_spelling(name, canonical):
    assert canonical_hook_name(name) == canonical
    assert canonical_hook_name(canonical) == canonical


def test_the_layer_is_read_from_the_name():
    assert layer_of("blocks.12.attn.hook_z") == 12
    assert layer_of("hook_embed") is None


def test_listed_hooks_are_canonical_and_in_forward_order(tiny_model):
    names = tiny_model.hook_names()
    assert names == [canonical_hook_name(name) for name in names]
    assert len(set(names)) == len(names)
    layers = [layer_of(name) for name in names if layer_of(name) is not None]
    assert layers == sorted(layers)
    for short in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
        assert f"blocks.2.hook_{short}" in names
    assert "blocks.2.attn.hook_z" in names


def test_every_listed_hook_can_be_captured_with_the_width_it_states(tiny_model):
    ids = tiny_model.to_tokens(["the river", "of the city and the sea"])
    acts = tiny_model.capture(ids.ids, tiny_model.hook_names(), ids.mask)
    assert {name: a.shape for name, a in acts.items()} == {
        name: (*ids.ids.shape, tiny_model.hook_width(name)) for name in tiny_model.hook_names()
    }


def test_heads_are_laid_side_by_side(tiny_model):
    assert tiny_model.hook_width("blocks.1.attn.hook_z") == tiny_model.d_model
    assert tiny_model.hook_width("blocks.1.mlp.hook_post") == 2 * tiny_model.d_model


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_resid", "blocks.1.hook_resid_"),
        ("blocks.9.hook_resid_post", "hook_resid_post"),
        ("blocks.1.attn.hook_zz", "blocks.1.attn.hook_z"),
    ],
)
def test_an_unknown_hook_lists_the_nearest_real_ones(tiny_model, wrong, right):
    with pytest.raises(ConfigError) as error:
        tiny_model.check_hook(wrong)
    assert wrong in str(error.value)
    assert right in str(error.value).split("did you mean")[1]


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_pattern", "blocks.1.hook_mlp_in"])
def test_a_hook_without_a_vector_for_each_token_is_refused(tiny_model, name):
    with pytest.raises(ConfigError, match="no vector for each token"):
        tiny_model.hook_width(name)


def test_aliases_give_the_same_activations(tiny_model):
    ids = torch.tensor([[1, 5, 9, 300]])
    acts = tiny_model.capture(ids, ["blocks.1.hook_out", "blocks.1.resid_post", "blocks.2.hook_resid_pre"])
    assert torch.equal(acts["blocks.1.hook_out"], acts["blocks.1.resid_post"])
    assert torch.equal(acts["blocks.1.hook_out"], acts["blocks.2.hook_resid_pre"])
