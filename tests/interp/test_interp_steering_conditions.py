from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError, ShapeError
from saelab.interp.steering import (
    ablate_feature,
    add_direction,
    as_edits,
    cap_projection,
    conditional,
    set_projection,
    steer,
)
from saelab.interp.steering_conditions import Condition, direction_exceeds, feature_fires
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata
from saelab.sae.topk import TopKConfig

EARLY, HOOK, LATE = (f"blocks.{layer}.hook_resid_post" for layer in range(3))
PROMPTS = ("The cat sat on the mat", "Once upon a time there", "Hello")


@pytest.fixture(scope="module")
def tokens(tiny_model):
    return tiny_model.to_tokens(list(PROMPTS))


@pytest.fixture(scope="module")
def before(tiny_model, tokens):
    return {name: acts_at(tiny_model, tokens, name) for name in (EARLY, HOOK, LATE)}


@pytest.fixture(scope="module")
def sae(tiny_model, before):
    sae = new_sae(
        TopKConfig(d_sae=2 * tiny_model.d_model, k=4),
        d_in=tiny_model.d_model,
        generator=torch.Generator().manual_seed(0),
    )
    norm = float(before[HOOK][:, 1:].norm(dim=-1).mean())
    sae.metadata = Metadata(model_name="tiny", hook_name=HOOK, mean_norm=norm)
    return sae


def acts_at(model, tokens, name: str) -> torch.Tensor:
    return model.capture(tokens.ids, [name], tokens.mask)[name].float()


def real(tokens) -> torch.Tensor:
    mask = tokens.mask.clone()
    mask[:, 0] = False
    return mask


def a_direction(model, seed: int = 1) -> torch.Tensor:
    return torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed)) * 3  # of no norm in particular


@pytest.mark.parametrize("strength", [0.0, 0.7, -0.4])
def test_orthogonal_sets_the_part_along_the_direction_and_keeps_the_rest(tiny_model, tokens, before, strength):
    direction = a_direction(tiny_model)
    unit = direction / direction.norm()
    with steer(tiny_model, set_projection(HOOK, direction, strength=strength, mean_norm=5.0)):
        after = acts_at(tiny_model, tokens, HOOK)[real(tokens)]
    was = before[HOOK][real(tokens)]
    slack = 0.02 * float(was.norm(dim=-1).max())
    torch.testing.assert_close(after @ unit, torch.full((len(after),), strength * 5.0), rtol=0, atol=slack)
    rest = after - (after @ unit)[:, None] * unit
    torch.testing.assert_close(rest, was - (was @ unit)[:, None] * unit, rtol=0, atol=slack)


def test_a_cap_lowers_what_is_above_it_and_leaves_the_others_bit_for_bit(tiny_model, tokens, before):
    direction = a_direction(tiny_model)
    unit = direction / direction.norm()
    along = (before[HOOK] @ unit)[real(tokens)]
    most = float(along.median())
    with steer(tiny_model, cap_projection(HOOK, direction, strength=most / 5.0, mean_norm=5.0)):
        after = acts_at(tiny_model, tokens, HOOK)[real(tokens)]
    above = along > most
    assert 0 < above.sum() < len(above)
    slack = 0.02 * float(before[HOOK].norm(dim=-1).max())
    torch.testing.assert_close(after[above] @ unit, torch.full((int(above.sum()),), most), rtol=0, atol=slack)
    torch.testing.assert_close(after[~above], before[HOOK][real(tokens)][~above], rtol=0, atol=0)


def test_a_direction_without_length_is_refused():
    for direction in (torch.zeros(4), torch.full((4,), torch.nan)):
        with pytest.raises(ConfigError, match="must have a length"):
            add_direction(HOOK, direction, strength=1.0, mean_norm=1.0)


@pytest.mark.parametrize("mode", ["orthogonal", "cap"])
def test_modes_by_name_are_the_edits_of_the_decoder_direction(tiny_model, sae, tokens, mode):
    make = {"orthogonal": set_projection, "cap": cap_projection}[mode]
    edit = make(HOOK, sae.W_dec[3], strength=0.2, mean_norm=sae.metadata.mean_norm)
    with steer(tiny_model, edit):
        expected = acts_at(tiny_model, tokens, HOOK)
    with steer(tiny_model, sae.feature(3), mode=mode, strength=0.2):
        assert torch.equal(acts_at(tiny_model, tokens, HOOK), expected)
    with pytest.raises(ConfigError, match="needs a strength"):
        as_edits(sae.feature(3), mode=mode)
    with pytest.raises(ConfigError, match="belongs to mode 'clamp'"):
        as_edits(sae.feature(3), mode=mode, strength=1.0, value=1.0)


def busiest(sae, acts: torch.Tensor, tokens) -> int:
    """A feature that fires on some of the tokens, but not on all."""
    share = (sae.encode(acts)[real(tokens)] > 0).float().mean(0)
    return int((share - 0.5).abs().argmin())


def test_a_condition_is_met_token_by_token(tiny_model, sae, tokens, before):
    i = busiest(sae, before[HOOK], tokens)
    fires = sae.encode(before[HOOK])[..., i] > 0
    push = add_direction(HOOK, a_direction(tiny_model), strength=0.5, mean_norm=5.0)
    with steer(tiny_model, push):
        everywhere = acts_at(tiny_model, tokens, HOOK)
    with steer(tiny_model, conditional(push, feature_fires(sae.feature(i)))):
        some = acts_at(tiny_model, tokens, HOOK)
    inside = real(tokens)
    assert 0 < (fires & inside).sum() < inside.sum()
    assert torch.equal(some[fires & inside], everywhere[fires & inside])
    assert torch.equal(some[~fires & inside], before[HOOK][~fires & inside])


def test_a_condition_may_be_read_earlier_in_the_model(tiny_model, tokens, before):
    probe = a_direction(tiny_model, seed=2)
    scores = before[EARLY] @ probe
    threshold = float(scores[real(tokens)].median())
    push = add_direction(LATE, a_direction(tiny_model), strength=0.5, mean_norm=5.0)
    with steer(tiny_model, conditional(push, direction_exceeds(EARLY, probe, above=threshold))):
        after = acts_at(tiny_model, tokens, LATE)
    moved = (after - before[LATE]).abs().sum(-1) > 0
    assert torch.equal(moved[real(tokens)], (scores > threshold)[real(tokens)])


def test_a_condition_sees_what_no_edit_at_its_hook_has_changed(tiny_model, sae, tokens, before):
    i = busiest(sae, before[HOOK], tokens)
    push = add_direction(HOOK, a_direction(tiny_model), strength=0.5, mean_norm=5.0)
    alone = conditional(push, feature_fires(sae.feature(i)))
    with steer(tiny_model, [ablate_feature(sae.feature(i)), alone]):
        together = acts_at(tiny_model, tokens, HOOK)
    with steer(tiny_model, alone):
        pushed = acts_at(tiny_model, tokens, HOOK)
    with steer(tiny_model, ablate_feature(sae.feature(i))):
        ablated = acts_at(tiny_model, tokens, HOOK)
    expected = before[HOOK] + (pushed - before[HOOK]) + (ablated - before[HOOK])
    slack = 0.02 * float(before[HOOK].norm(dim=-1).max())
    torch.testing.assert_close(together[real(tokens)], expected[real(tokens)], rtol=0, atol=slack)


def test_each_of_several_features_has_its_own_condition(tiny_model, sae, tokens, before):
    probe = a_direction(tiny_model, seed=2)
    threshold = float((before[HOOK] @ probe)[real(tokens)].median())
    a, b = (add_direction(HOOK, a_direction(tiny_model, seed), strength=0.5, mean_norm=5.0) for seed in (3, 4))
    above, below = direction_exceeds(HOOK, probe, above=threshold), direction_exceeds(HOOK, -probe, above=-threshold)
    with steer(tiny_model, a):
        only_a = acts_at(tiny_model, tokens, HOOK)
    with steer(tiny_model, b):
        only_b = acts_at(tiny_model, tokens, HOOK)
    with steer(tiny_model, [conditional(a, above), conditional(b, below)]):
        both = acts_at(tiny_model, tokens, HOOK)
    high, low = before[HOOK] @ probe > threshold, before[HOOK] @ probe < threshold
    assert torch.equal(both[high & real(tokens)], only_a[high & real(tokens)])
    assert torch.equal(both[low & real(tokens)], only_b[low & real(tokens)])


def test_a_condition_that_never_holds_changes_no_bit(tiny_model, tokens):
    push = add_direction(HOOK, a_direction(tiny_model), strength=9.0, mean_norm=5.0)
    never = direction_exceeds(EARLY, a_direction(tiny_model), above=1e9)
    clean = tiny_model.logits(tokens.ids, tokens.mask)
    with steer(tiny_model, conditional(push, never)):
        assert torch.equal(tiny_model.logits(tokens.ids, tokens.mask), clean)
        written = tiny_model.generate("The cat", max_new_tokens=6)
    assert written == tiny_model.generate("The cat", max_new_tokens=6)
    assert tiny_model.active_hooks() == []


def test_a_condition_holds_for_new_tokens_while_generating(tiny_model, tokens, before):
    """Writing with a cache sees one token at a time; it must judge each as a pass over the whole text does."""
    probe = a_direction(tiny_model, seed=2)
    threshold = float((before[EARLY] @ probe)[real(tokens)].median())
    push = add_direction(LATE, a_direction(tiny_model), strength=3.0, mean_norm=5.0)
    edit = conditional(push, direction_exceeds(EARLY, probe, above=threshold))
    prompt = tiny_model.to_tokens("The cat sat")
    steps: list[torch.Tensor] = []
    late = tiny_model.edit(LATE, lambda acts, keep: steps.append(acts.clone()) or acts)
    with steer(tiny_model, edit), late:
        tiny_model.generate(prompt, max_new_tokens=8, stop_at_eos=False)
    seen = torch.cat(steps, 1).float()
    assert [step.shape[1] for step in steps] == [prompt.ids.shape[1]] + [1] * 7
    early: list[torch.Tensor] = []
    with steer(tiny_model, edit), tiny_model.edit(EARLY, lambda acts, keep: early.append(acts.clone()) or acts):
        tiny_model.generate(prompt, max_new_tokens=8, stop_at_eos=False)
    holds = (torch.cat(early, 1).float() @ probe > threshold)[0, 1:]
    assert 0 < holds.sum() < len(holds)
    along = (seen[0, 1:] @ push.delta(seen)[0, 0]) / push.delta(seen)[0, 0].norm()
    assert along[holds].min() > along[~holds].max()  # pushed by 15, far more than tokens differ by themselves


def test_a_condition_further_on_than_its_edit_is_refused(tiny_model):
    push = add_direction(EARLY, a_direction(tiny_model), strength=1.0, mean_norm=1.0)
    late = direction_exceeds(LATE, a_direction(tiny_model), above=0.0)
    with pytest.raises(ConfigError, match="comes after"), steer(tiny_model, conditional(push, late)):
        pass


def test_conditions_that_do_not_fit(tiny_model):
    push = add_direction(HOOK, a_direction(tiny_model), strength=1.0, mean_norm=1.0)
    wide = direction_exceeds(HOOK, torch.ones(tiny_model.d_model + 1), above=0.0)
    with pytest.raises(ShapeError, match="the condition there has width"), steer(tiny_model, conditional(push, wide)):
        pass
    with pytest.raises(ConfigError, match="must be a finite number"):
        Condition(HOOK, lambda acts: acts[..., 0], above=float("nan"))


def test_a_conditional_edit_leaves_no_trace_after_an_error(tiny_model, tokens):
    clean = tiny_model.logits(tokens.ids, tokens.mask)
    push = add_direction(HOOK, a_direction(tiny_model), strength=1.0, mean_norm=5.0)
    edit = conditional(push, direction_exceeds(EARLY, a_direction(tiny_model), above=0.0))
    with pytest.raises(RuntimeError, match="stop"), steer(tiny_model, edit):
        tiny_model.logits(tokens.ids, tokens.mask)
        raise RuntimeError("stop")
    assert tiny_model.active_hooks() == []
    assert torch.equal(tiny_model.logits(tokens.ids, tokens.mask), clean)
