"""Reading activations: exactly Hugging Face's, no further than needed, and unmoved by padding."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from saelab.errors import ShapeError
from saelab.models.tokens import behind_first, left_padded

TEXTS = ["the river's long way to the sea", "war", "Zwölf Boxkämpfer 漢字", ""]


@pytest.fixture(scope="module")
def plain(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="eager").eval()


def test_captured_streams_equal_hugging_faces_hidden_states(tiny_model, plain):
    ids = tiny_model.to_tokens(TEXTS[0]).ids
    with torch.no_grad():
        hidden = plain(ids, output_hidden_states=True).hidden_states
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    acts = tiny_model.capture(ids, names)
    for layer, name in enumerate(names):
        assert torch.equal(acts[name], hidden[layer])


def test_logits_equal_hugging_faces_with_padding_on_either_side(tiny_model, plain):
    tokens = tiny_model.to_tokens(TEXTS)
    for ids, mask in (tokens, left_padded(tokens)):
        logits = tiny_model.logits(ids, mask)
        for row, text in enumerate(TEXTS):
            alone = tiny_model.to_tokens(text).ids
            with torch.no_grad():
                torch.testing.assert_close(logits[row, mask[row]], plain(alone).logits[0], rtol=1e-4, atol=1e-4)


def test_the_forward_stops_at_the_last_layer_needed(tiny_model):
    entered: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda module, args, layer=layer: entered.append(layer))
        for layer, block in enumerate(tiny_model.bridge.original_model.model.layers)
    ]
    ids = tiny_model.to_tokens("the sea").ids
    try:
        tiny_model.capture(ids, ["blocks.0.attn.hook_z"])
        assert entered == [0]
        entered.clear()
        tiny_model.capture(ids, ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post"])
        assert entered == [0, 1]
        entered.clear()
        tiny_model.capture(ids, ["blocks.2.hook_mlp_out", "blocks.0.hook_resid_mid"])
        assert entered == [0, 1, 2]
    finally:
        for handle in handles:
            handle.remove()
    assert tiny_model.active_hooks() == []


def test_stopping_early_changes_no_later_forward(tiny_model):
    ids = tiny_model.to_tokens(TEXTS[0]).ids
    before = tiny_model.logits(ids)
    tiny_model.capture(ids, ["blocks.0.hook_resid_post"])
    assert torch.equal(tiny_model.logits(ids), before)


def test_captured_activations_can_be_trained_on(tiny_model):
    acts = tiny_model.capture(torch.tensor([[1, 7, 9]]), ["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]
    weight = torch.randn(32, 4, requires_grad=True)
    (acts @ weight).sum().backward()
    assert weight.grad is not None
    assert not acts.requires_grad


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.zeros(1, 257, dtype=torch.long), "257 tokens, but .* takes 256"),
        (torch.tensor([[1, 500]]), "from 1 to 500, .* tokenized for another model"),
        (torch.tensor([[-1, 5]]), "from -1 to 5"),
    ],
)
def test_ids_that_the_model_cannot_read_are_refused(tiny_model, ids, sentence):
    with pytest.raises(ShapeError, match=sentence):
        tiny_model.logits(ids)


def test_a_mask_of_another_shape_is_refused(tiny_model):
    with pytest.raises(ShapeError, match="make them equal"):
        tiny_model._check_tokens(torch.tensor([[1, 5, 6]]), torch.ones(1, 2, dtype=torch.bool))


def test_only_tokens_behind_the_first_real_one_count():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    expected = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    assert torch.equal(behind_first(mask), expected)


def test_moving_padding_to_the_left_keeps_the_order_of_tokens(tiny_model):
    tokens = tiny_model.to_tokens(TEXTS)
    ids, mask = left_padded(tokens)
    for row in range(len(TEXTS)):
        assert ids[row, mask[row]].tolist() == tokens.ids[row, tokens.mask[row]].tolist()
        assert not mask[row, : int((~tokens.mask[row]).sum())].any()
