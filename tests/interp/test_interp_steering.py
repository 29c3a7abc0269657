from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError, ShapeError
from saelab.interp.steering import Edit, ablate_feature, add_direction, steer
from saelab.interp.steering_record import (
    RecordConfig,
    mean_rise,
    next_token_kl,
    next_token_logps,
    push_to_kl,
    steering_record,
)
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata
from saelab.sae.topk import TopKConfig

HOOK = "blocks.1.hook_resid_post"
PROMPTS = ("The cat sat", "Once upon a time there", "Hello")


@pytest.fixture(scope="module")
def sae(tiny_model):
    sae = new_sae(
        TopKConfig(d_sae=3 * tiny_model.d_model, k=4),
        d_in=tiny_model.d_model,
        generator=torch.Generator().manual_seed(0),
    )
    ids = tiny_model.to_tokens(list(PROMPTS)).ids
    acts = tiny_model.capture(ids, [HOOK])[HOOK][:, 1:].float()
    sae.metadata = Metadata(model_name="tiny", hook_name=HOOK, mean_norm=float(acts.norm(dim=-1).mean()))
    return sae


@pytest.fixture(scope="module")
def tokens(tiny_model):
    return tiny_model.to_tokens(list(PROMPTS))


def acts_under(model, tokens, *edits: Edit) -> torch.Tensor:
    with steer(model, list(edits)):
        return model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK].float()


def busiest(sae, acts: torch.Tensor) -> int:
    return int(sae.encode(acts[:, 1:]).sum((0, 1)).argmax())


def test_adding_moves_every_token_but_bos_by_the_strength(tiny_model, sae, tokens):
    before = tiny_model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK].float()
    with steer(tiny_model, sae.feature(3), strength=0.5):
        after = tiny_model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK].float()
    moved = (after - before)[:, 1:][tokens.mask[:, 1:]]
    expected = 0.5 * sae.metadata.mean_norm * sae.feature(3).direction
    torch.testing.assert_close(moved, expected.expand_as(moved), rtol=0.02, atol=0.02 * sae.metadata.mean_norm)
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=0)


def test_ablation_removes_the_feature_and_keeps_the_error_term(tiny_model, sae, tokens):
    before = tiny_model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK].float()
    i = busiest(sae, before)
    after = acts_under(tiny_model, tokens, ablate_feature(sae.feature(i)))
    expected = before - sae.encode(before)[..., i : i + 1] * sae.W_dec[i]
    real = tokens.mask.clone()
    real[:, 0] = False
    torch.testing.assert_close(after[real], expected[real], rtol=0.02, atol=0.02 * sae.metadata.mean_norm)


def test_clamping_sets_the_contribution(tiny_model, sae, tokens):
    before = tiny_model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK].float()
    with steer(tiny_model, sae.feature(5), mode="clamp", value=7.0):
        after = tiny_model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK].float()
    expected = before + (7.0 - sae.encode(before)[..., 5:6]) * sae.W_dec[5]
    real = tokens.mask.clone()
    real[:, 0] = False
    torch.testing.assert_close(after[real], expected[real], rtol=0.02, atol=0.02 * sae.metadata.mean_norm)


def test_a_feature_that_never_fires_can_be_ablated_for_free(tiny_model, sae, tokens):
    before = tiny_model.capture(tokens.ids, [HOOK], tokens.mask)[HOOK].float()
    silent = int(sae.encode(before).sum((0, 1)).argmin())
    logits = tiny_model.logits(tokens.ids, tokens.mask)
    with steer(tiny_model, sae.feature(silent), mode="ablate"):
        torch.testing.assert_close(tiny_model.logits(tokens.ids, tokens.mask), logits, rtol=0, atol=0)


def test_targets_at_one_hook_commute(tiny_model, sae, tokens):
    a, b = ablate_feature(sae.feature(1)), ablate_feature(sae.feature(2))
    torch.testing.assert_close(
        acts_under(tiny_model, tokens, a, b), acts_under(tiny_model, tokens, b, a), rtol=0, atol=0
    )


def test_several_hooks_are_steered_together(tiny_model, sae, tokens):
    early = add_direction("blocks.0.hook_resid_post", torch.ones(tiny_model.d_model), strength=0.3, mean_norm=1.0)
    alone = acts_under(tiny_model, tokens, early)
    both = acts_under(tiny_model, tokens, early, add_direction(HOOK, sae.W_dec[0], strength=0.3, mean_norm=1.0))
    real = tokens.mask.clone()
    real[:, 0] = False
    torch.testing.assert_close(
        (both - alone)[real], (0.3 * sae.W_dec[0]).expand_as(both[real]).detach(), rtol=0.1, atol=0.05
    )


def test_an_edit_of_another_width_is_refused_before_the_model_runs(tiny_model):
    edit = add_direction(HOOK, torch.ones(tiny_model.d_model + 1), strength=0.3, mean_norm=1.0)
    with pytest.raises(ShapeError, match=f"has width {tiny_model.d_model}, but"), steer(tiny_model, edit):
        pass


def test_an_edit_takes_no_strength_of_its_own(tiny_model):
    edit = add_direction(HOOK, torch.ones(tiny_model.d_model), strength=0.3, mean_norm=1.0)
    with pytest.raises(ConfigError, match="says by itself what it adds"), steer(tiny_model, edit, strength=2.0):
        pass


@pytest.mark.parametrize("mode", ["add", "ablate", "clamp"])
def test_steering_leaves_no_trace_also_after_an_error(tiny_model, sae, tokens, mode):
    before = tiny_model.logits(tokens.ids, tokens.mask)
    arguments = {"value": 3.0} if mode == "clamp" else {}
    with pytest.raises(RuntimeError, match="stop"), steer(tiny_model, sae.feature(0), mode=mode, **arguments):
        tiny_model.generate("The", max_new_tokens=2)
        raise RuntimeError("the user pressed stop")
    torch.testing.assert_close(tiny_model.logits(tokens.ids, tokens.mask), before, rtol=0, atol=0)
    assert not [name for name, point in tiny_model.bridge.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]


def test_steered_generation_differs_and_is_repeatable(tiny_model, sae):
    plain = tiny_model.generate("The cat", max_new_tokens=8)
    with steer(tiny_model, sae.feature(7), strength=4.0):
        steered = [tiny_model.generate("The cat", max_new_tokens=8) for _ in range(2)]
    assert steered[0] == steered[1] != plain
    assert tiny_model.generate("The cat", max_new_tokens=8) == plain


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mode": "clamp"}, "takes a value"),
        ({"mode": "clamp", "value": 1.0, "strength": 1.0}, "takes a value in units"),
        ({"mode": "ablate", "strength": 1.0}, "takes no strength"),
        ({"value": 1.0}, "a value belongs to mode 'clamp'"),
        ({"mode": "push"}, "mode must be"),
    ],
)
def test_a_mode_and_its_number_must_go_together(tiny_model, sae, arguments, sentence):
    with (
        pytest.raises((ConfigError, TypeError), match=sentence if arguments.get("mode") != "push" else None),
        steer(tiny_model, sae.feature(0), **arguments),
    ):
        pass


def test_an_sae_without_a_norm_cannot_be_pushed(tiny_model, sae):
    from dataclasses import replace

    bare = new_sae(TopKConfig(d_sae=8, k=2), d_in=tiny_model.d_model, generator=torch.Generator().manual_seed(0))
    bare.metadata = replace(sae.metadata, mean_norm=None)
    with (
        pytest.raises(ConfigError, match="does not record the mean norm"),
        steer(tiny_model, bare.feature(0), strength=1.0),
    ):
        pass


def test_kl_and_rise_by_hand():
    clean = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    edited = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    expected = (0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(0.5 / 0.75).log()) / 2
    assert next_token_kl(clean, edited) == pytest.approx(float(expected))
    assert mean_rise(clean, edited, [1]) == pytest.approx(float(torch.tensor(1.5).log() / 2))


@pytest.mark.parametrize("kl", [0.01, 0.3])
def test_a_direction_is_pushed_to_the_wanted_cost(tiny_model, sae, tokens, kl):
    clean = next_token_logps(tiny_model, tokens)
    pushed = push_to_kl(
        tiny_model,
        tokens,
        clean,
        lambda s: add_direction(HOOK, sae.W_dec[2], strength=s, mean_norm=sae.metadata.mean_norm),
        kl=kl,
    )
    assert pushed.kl == pytest.approx(kl, rel=0.011)


def test_a_cost_out_of_reach_is_said(tiny_model, sae, tokens):
    clean = next_token_logps(tiny_model, tokens)
    with pytest.raises(ConfigError, match="steering reaches a KL of only"):
        push_to_kl(
            tiny_model, tokens, clean, lambda s: add_direction(HOOK, sae.W_dec[2], strength=0.0, mean_norm=1.0), kl=1.0
        )


def test_a_direction_that_raises_its_tokens_beats_random_ones(tiny_model, sae, tokens):
    """A feature that points at a token's unembedding must raise that token more than chance does."""
    token = 50
    pointed = new_sae(TopKConfig(d_sae=4, k=2), d_in=tiny_model.d_model, generator=torch.Generator().manual_seed(0))
    direction = torch.nn.functional.normalize(tiny_model.unembed[:, token].float(), dim=0)
    with torch.no_grad():
        pointed.W_dec[0] = direction
    pointed.metadata = sae.metadata
    record = steering_record(tiny_model, pointed, {0: [token]}, RecordConfig(kl=0.05, n_random=6, prompts=PROMPTS))
    assert record.effects[0].kl == pytest.approx(0.05, rel=0.011)
    assert record.advantage.value > 0.3
    assert len(record.effects[0].random_rises) == 6


def test_a_record_needs_features(tiny_model, sae):
    with pytest.raises(ConfigError, match="no feature to measure"):
        steering_record(tiny_model, sae, {}, RecordConfig(prompts=PROMPTS))
