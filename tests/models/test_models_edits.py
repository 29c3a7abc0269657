"""Edits: they do what they say, spare BOS and padding, and leave no trace."""

from __future__ import annotations

import threading

import pytest
import torch

from saelab.errors import ConfigError, ShapeError
from saelab.models.tokens import behind_first, left_padded

HOOK = "blocks.1.hook_resid_post"
RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
PLACES = (*RESIDUAL, "hook_attn_out", "hook_mlp_out", "attn.hook_z", "mlp.hook_post")


@pytest.fixture
def tokens(tiny_model):
    return tiny_model.to_tokens(["the river of the city", "war", "in this year she was the first"])


def test_an_edit_changes_exactly_the_positions_to_keep(tiny_model, tokens):
    before = tiny_model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK]
    with tiny_model.edit(HOOK, lambda acts, keep: acts + 3):
        after = tiny_model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK]
    keep = behind_first(tokens.mask)
    assert torch.equal(after[keep], before[keep] + 3)
    assert torch.equal(after[~keep], before[~keep])


@pytest.mark.parametrize("side", ["right", "left"])
def test_keep_is_false_at_bos_and_padding(tiny_model, tokens, side):
    ids, mask = tokens if side == "right" else left_padded(tokens)
    seen = []

    def fn(acts, keep):
        seen.append(keep.clone())
        return acts

    with tiny_model.edit(HOOK, fn):
        tiny_model.logits(ids, mask)
    assert torch.equal(seen[0], behind_first(mask))
    assert not seen[0][ids == tiny_model.bos_id].any()
    assert not seen[0][~mask].any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_even_an_edit_in_place_cannot_reach_bos_and_padding(tiny_model, tokens, side):
    ids, mask = tokens if side == "right" else left_padded(tokens)
    before = tiny_model.capture(ids, [HOOK], mask)[HOOK]
    with tiny_model.edit(HOOK, lambda acts, keep: acts.fill_(7.0)):
        after = tiny_model.capture(ids, [HOOK], mask)[HOOK]
    keep = behind_first(mask)
    assert (after[keep] == 7).all()
    assert torch.equal(after[~keep], before[~keep])


@pytest.mark.parametrize("place", PLACES)
def test_an_edit_at_each_place_moves_later_logits_and_no_earlier_ones(tiny_model, tokens, place):
    before = tiny_model.logits(*tokens)
    with tiny_model.edit(f"blocks.1.{place}", lambda acts, keep: acts + 1):
        moved = (tiny_model.logits(*tokens) - before).abs().amax(-1)
    assert (moved[behind_first(tokens.mask)] > 1e-4).all()
    assert (moved[:, 0] == 0).all()


def test_an_edit_in_the_middle_of_a_block_moves_the_stream_itself(tiny_model, tokens):
    names = ["blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", HOOK]
    shift = torch.linspace(-2, 2, tiny_model.d_model)
    with tiny_model.edit("blocks.1.resid_mid", lambda acts, keep: acts + shift):
        acts = tiny_model.capture(tokens.ids, names, tokens.mask)
    torch.testing.assert_close(acts[names[0]] + acts[names[1]], acts[HOOK])


def test_edits_in_the_middle_act_before_those_at_the_end_whatever_their_nesting(tiny_model, tokens):
    with (
        tiny_model.edit(HOOK, lambda acts, keep: torch.zeros_like(acts)),
        tiny_model.edit("blocks.1.hook_resid_mid", lambda acts, keep: acts + 1),
    ):
        acts = tiny_model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK]
    assert (acts[behind_first(tokens.mask)] == 0).all()


def test_a_zeroed_last_layer_leaves_only_the_norms_of_zero(tiny_model, tokens):
    with tiny_model.edit("blocks.2.hook_resid_post", lambda acts, keep: torch.zeros_like(acts)):
        logits = tiny_model.logits(*tokens)
    assert (logits[behind_first(tokens.mask)] == 0).all()


def test_nested_edits_act_from_the_outside_in(tiny_model, tokens):
    keep = behind_first(tokens.mask)
    with tiny_model.edit(HOOK, lambda acts, keep: acts * 0 + 1), tiny_model.edit(HOOK, lambda acts, keep: acts * 10):
        assert (tiny_model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK][keep] == 10).all()
    with tiny_model.edit(HOOK, lambda acts, keep: acts * 10), tiny_model.edit(HOOK, lambda acts, keep: acts * 0 + 1):
        assert (tiny_model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK][keep] == 1).all()


def test_several_edits_at_once_equal_nested_ones(tiny_model, tokens):
    add, double = (lambda acts, keep: acts + 1), (lambda acts, keep: acts * 2)
    other = "blocks.0.attn.hook_z"
    with tiny_model.edit(HOOK, add), tiny_model.edit(HOOK, double), tiny_model.edit(other, double):
        nested = tiny_model.logits(*tokens)
    with tiny_model.edits([(HOOK, add), (HOOK, double), (other, double)]):
        assert torch.equal(tiny_model.logits(*tokens), nested)
    with tiny_model.edits({HOOK: lambda acts, keep: double(add(acts, keep), keep), other: double}):
        assert torch.equal(tiny_model.logits(*tokens), nested)


def test_the_inner_edit_ends_with_its_own_block(tiny_model, tokens):
    with tiny_model.edit(HOOK, lambda acts, keep: acts + 1):
        outer = tiny_model.logits(*tokens)
        with tiny_model.edit(HOOK, lambda acts, keep: acts * 5):
            assert not torch.equal(tiny_model.logits(*tokens), outer)
        assert torch.equal(tiny_model.logits(*tokens), outer)


class Stop(Exception):
    pass


def failing(acts, keep):
    raise Stop


@pytest.mark.parametrize("place", PLACES)
def test_edits_are_undone_after_an_exception(tiny_model, tokens, place):
    before = tiny_model.logits(*tokens)
    with pytest.raises(Stop), tiny_model.edit(f"blocks.1.{place}", lambda acts, keep: acts + 1):
        tiny_model.generate("the", max_new_tokens=2)
        assert tiny_model.active_hooks() != []
        raise Stop
    assert tiny_model.active_hooks() == []
    with pytest.raises(Stop), tiny_model.edit(f"blocks.1.{place}", failing):  # this time within the forward pass
        tiny_model.logits(*tokens)
    assert tiny_model.active_hooks() == []
    assert torch.equal(tiny_model.logits(*tokens), before)


def test_an_unknown_second_hook_leaves_the_first_unattached(tiny_model):
    with (
        pytest.raises(ConfigError, match="no hook"),
        tiny_model.edits([(HOOK, failing), ("blocks.1.hook_nothing", failing)]),
    ):
        pass
    assert tiny_model.active_hooks() == []


def test_an_edit_that_changes_the_shape_is_refused(tiny_model, tokens):
    with pytest.raises(ShapeError, match="keep the shape"), tiny_model.edit(HOOK, lambda acts, keep: acts[..., :1]):
        tiny_model.logits(*tokens)


def test_a_forward_around_the_model_is_refused_while_an_edit_is_active(tiny_model, tokens):
    with pytest.raises(ConfigError, match="did not come through"), tiny_model.edit(HOOK, lambda acts, keep: acts):
        tiny_model.bridge(tokens.ids)
    assert tiny_model.active_hooks() == []
    tiny_model.bridge(tokens.ids)


def test_heads_can_be_edited_one_by_one(tiny_model, tokens):
    name = "blocks.1.attn.hook_z"
    d_head = tiny_model.hook_width(name) // 2

    def silence_second_head(acts, keep):
        return torch.cat([acts[..., :d_head], torch.zeros_like(acts[..., d_head:])], -1)

    before = tiny_model.capture(tokens.ids, [name], tokens.mask)[name]
    with tiny_model.edit(name, silence_second_head):
        after = tiny_model.capture(tokens.ids, [name], tokens.mask)[name]
    keep = behind_first(tokens.mask)
    assert torch.equal(after[keep][:, :d_head], before[keep][:, :d_head])
    assert (after[keep][:, d_head:] == 0).all()


def test_other_threads_never_see_an_edit(tiny_model, tokens):
    clean = tiny_model.logits(*tokens)
    with tiny_model.edit(HOOK, lambda acts, keep: acts + 5):
        edited = tiny_model.logits(*tokens)
    seen = {"clean": [], "edited": []}

    def read():
        for _ in range(10):
            seen["clean"].append(torch.equal(tiny_model.logits(*tokens), clean))

    def steer():
        for _ in range(10):
            with tiny_model.edit(HOOK, lambda acts, keep: acts + 5):
                seen["edited"].append(torch.equal(tiny_model.logits(*tokens), edited))

    threads = [threading.Thread(target=work) for work in (read, steer, read, steer)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"clean": [True] * 20, "edited": [True] * 20}
