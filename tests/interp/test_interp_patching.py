from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError, ShapeError, TextError
from saelab.interp.patch_metrics import divergence_from, log_probability, logit_difference, probability
from saelab.interp.patch_runs import changing, run_patched
from saelab.interp.patch_sites import Site, cells, head_site
from saelab.interp.patching import ablate, patch
from saelab.interp.prompt_pairs import prompt_pair
from saelab.interp.replacements import ablations, from_run
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata
from saelab.sae.topk import TopKConfig

HOOK = "blocks.1.hook_resid_post"
CLEAN, CORRUPT = "the king of the north island was old", "the people of the south island was old"
METRIC = logit_difference(20, 30)
AT = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head", "position", "feature")
METHODS = ("exact", "attribution", "ig", "ig_inputs")


@pytest.fixture(scope="module")
def pair(tiny_model):
    return prompt_pair(tiny_model, CLEAN, CORRUPT)


@pytest.fixture(scope="module")
def sae(tiny_model):
    generator = torch.Generator().manual_seed(0)
    sae = new_sae(TopKConfig(d_sae=3 * tiny_model.d_model, k=4), d_in=tiny_model.d_model, generator=generator)
    sae.metadata = Metadata(model_name="tiny", hook_name=HOOK)
    return sae


@pytest.fixture(scope="module")
def features(tiny_model, sae, pair):
    """Features that fire somewhere in the clean prompt, the strongest first."""
    acts = sae.encode(tiny_model.capture(pair.clean, [HOOK])[HOOK][0, 1:])
    return [sae.feature(int(i)) for i in acts.sum(0).argsort(descending=True)[:5]]


def everywhere(pair) -> tuple[int, ...]:
    return tuple(range(1, pair.clean.shape[1]))


def patched_logits(model, ids, row):
    with model.edits(changing([row])):
        return model.logits(ids)


def chosen(at, features):
    return features if at == "feature" else ()


def test_a_pair_names_the_positions_that_differ(tiny_model, pair):
    tokens = [tiny_model.str_tokens(ids[0]) for ids in (pair.clean, pair.corrupt)]
    assert pair.differing == tuple(i for i, (a, b) in enumerate(zip(*tokens, strict=True)) if a != b)
    assert len(pair.differing) == 2


def test_prompts_of_other_lengths_are_refused_with_their_tokens(tiny_model):
    with pytest.raises(TextError, match=r"4 tokens and the corrupt one 5 \( the\| city\| was against"):
        prompt_pair(tiny_model, " the city was", " the city was small")


def test_equal_prompts_are_refused(tiny_model):
    with pytest.raises(TextError, match="are the same"):
        prompt_pair(tiny_model, CLEAN, CLEAN)


@pytest.mark.parametrize("place", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_full_residual_stream_gives_exactly_the_clean_run(tiny_model, pair, place, layer):
    site = Site(f"blocks.{layer}.hook_{place}", everywhere(pair))
    row = [(site, from_run(tiny_model, pair.clean, [site])[site.key])]
    clean = tiny_model.logits(pair.clean)
    torch.testing.assert_close(patched_logits(tiny_model, pair.corrupt, row), clean, rtol=0, atol=0)


def test_the_full_residual_stream_in_the_middle_of_a_block_gives_the_clean_run_up_to_rounding(tiny_model, pair):
    site = Site("blocks.1.hook_resid_mid", everywhere(pair))
    row = [(site, from_run(tiny_model, pair.clean, [site])[site.key])]
    clean = tiny_model.logits(pair.clean)
    torch.testing.assert_close(patched_logits(tiny_model, pair.corrupt, row), clean, rtol=1e-4, atol=1e-4)


def test_all_positions_through_all_layers_give_exactly_the_clean_run(tiny_model, pair):
    grid = cells(tiny_model, "position", tiny_model.str_tokens(pair.clean[0]))
    sites = [site for cell in grid.sites[0] for site in cell]
    source = from_run(tiny_model, pair.clean, sites)
    row = [(site, source[site.key]) for site in sites]
    torch.testing.assert_close(
        patched_logits(tiny_model, pair.corrupt, row), tiny_model.logits(pair.clean), rtol=0, atol=0
    )


@pytest.mark.parametrize("at", AT)
def test_patching_a_run_with_itself_changes_no_bit(tiny_model, pair, features, at):
    grid = cells(tiny_model, at, tiny_model.str_tokens(pair.clean[0]), features=chosen(at, features))
    sites = [site for row in grid.sites for cell in row for site in cell]
    source = from_run(tiny_model, pair.clean, sites)
    row = [(site, source[site.key]) for site in sites]
    clean = tiny_model.logits(pair.clean)
    torch.testing.assert_close(patched_logits(tiny_model, pair.clean, row), clean, rtol=0, atol=0)


def test_a_row_without_changes_is_the_run_as_it_is_bit_by_bit(tiny_model, pair):
    value = run_patched(tiny_model, pair.clean, [()], METRIC)
    torch.testing.assert_close(value, METRIC(tiny_model.logits(pair.clean)), rtol=0, atol=0)


def test_rows_of_a_batch_do_not_touch_each_other(tiny_model, pair):
    site = Site(HOOK, everywhere(pair))
    source = from_run(tiny_model, pair.corrupt, [site])[site.key]
    rows = [[(Site(HOOK, (p,)), source)] if p else [] for p in range(pair.clean.shape[1])]
    together = run_patched(tiny_model, pair.clean, rows, METRIC, batch_size=3)
    alone = torch.cat([run_patched(tiny_model, pair.clean, [row], METRIC) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert len(set(alone.tolist())) == len(alone) - min(prompt_pair(tiny_model, CLEAN, CORRUPT).differing) + 1


def test_before_the_first_difference_nothing_has_an_effect(tiny_model, pair):
    grid = patch(tiny_model, CLEAN, CORRUPT, metric=METRIC)
    n_equal = pair.differing[0] - 1
    assert grid.effects[:, :n_equal].abs().max() < 1e-5
    assert grid.effects[0, n_equal:].abs().min() > 1e-3


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_last_position_of_the_last_layer_has_the_whole_effect(tiny_model, pair, direction):
    grid = patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, direction=direction)
    values = [float(METRIC(tiny_model.logits(ids))) for ids in (pair.corrupt, pair.clean)]
    assert [grid.base, grid.target] == pytest.approx(values if direction == "denoise" else values[::-1])
    assert float(grid.shares[-1, -1]) == pytest.approx(1, abs=1e-4)
    assert float(grid.effects[-1, -1]) == pytest.approx(grid.target - grid.base, abs=1e-4)
    assert grid.shares[-1, :-1].abs().max() < 1e-4  # no later layer reads the other positions


def test_all_heads_together_are_the_attention_output(tiny_model, pair):
    where = everywhere(pair)
    heads = [head_site(tiny_model, 1, h, where) for h in range(2)]
    whole = Site("blocks.1.hook_attn_out", where)
    source = from_run(tiny_model, pair.clean, [*heads, whole])
    rows = [[(site, source[site.key]) for site in group] for group in (heads, [whole], heads[:1])]
    by_heads, by_whole, one_head = run_patched(tiny_model, pair.corrupt, rows, METRIC).tolist()
    assert by_heads == pytest.approx(by_whole, abs=1e-4)
    assert one_head != pytest.approx(by_whole, abs=1e-2)


def test_a_feature_is_patched_and_the_rest_of_the_activations_stays(tiny_model, sae, pair, features):
    feature, position = features[0], 3
    site = Site(HOOK, (position,), feature=feature)
    source = from_run(tiny_model, pair.clean, [site])
    before = tiny_model.capture(pair.corrupt, [HOOK])[HOOK]
    other = tiny_model.capture(pair.clean, [HOOK])[HOOK]
    with tiny_model.edits(changing([[(site, source[site.key])]])):
        after = tiny_model.capture(pair.corrupt, [HOOK])[HOOK]
    expected = before.clone()
    i = feature.index
    expected[0, position] += (sae.encode(other)[0, position, i] - sae.encode(before)[0, position, i]) * sae.W_dec[i]
    torch.testing.assert_close(after, expected.detach())


def test_several_features_of_a_row_commute(tiny_model, pair, features):
    sites = [Site(HOOK, everywhere(pair), feature=feature) for feature in features]
    source = from_run(tiny_model, pair.clean, sites)
    rows = [[(site, source[site.key]) for site in order] for order in (sites, sites[::-1])]
    ours, theirs = run_patched(tiny_model, pair.corrupt, rows, METRIC).tolist()
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_zero_ablation_of_a_feature_is_steering_by_ablation(tiny_model, features):
    from saelab.interp.steering import ablate_feature, steer

    ids = tiny_model.to_tokens(CLEAN).ids
    site = Site(HOOK, tuple(range(1, ids.shape[1])), feature=features[0])
    (values,) = ablations(tiny_model, ids, [site], by="zero")
    ours = run_patched(tiny_model, ids, [[(site, values[site.key])]], METRIC)
    with steer(tiny_model, ablate_feature(features[0])):
        theirs = METRIC(tiny_model.logits(ids))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_mean_is_over_all_tokens_but_bos(tiny_model):
    ids, texts = tiny_model.to_tokens(CLEAN).ids, ["the river was long", "a small tower in the city of light"]
    site = Site(HOOK, (1, 2))
    (values,) = ablations(tiny_model, ids, [site], by="mean", texts=texts)
    acts = torch.cat([tiny_model.capture(tiny_model.to_tokens(t).ids, [HOOK])[HOOK][0, 1:] for t in texts])
    torch.testing.assert_close(values[site.key], acts.mean(0).expand(ids.shape[1], -1))


def test_resampling_averages_the_effects_of_its_draws(tiny_model):
    texts = [
        "the river was long and so was the other music of people",
        "a tower of the city in the water was not small",
    ]
    settings = {"metric": METRIC, "layers": [1], "positions": [4]}
    ids = tiny_model.to_tokens(CLEAN).ids
    site = Site(HOOK, (4,))
    alone = []
    for text in texts:
        other = tiny_model.to_tokens(text).ids[:, : ids.shape[1]]
        row = [(site, from_run(tiny_model, other, [site])[site.key])]
        alone.append(float(run_patched(tiny_model, ids, [row], METRIC)[0] - METRIC(tiny_model.logits(ids))[0]))
    grid = ablate(tiny_model, CLEAN, by="resample", texts=texts, n_draws=2, **settings)
    assert float(grid.effects[0, 0]) == pytest.approx(sum(alone) / 2, abs=1e-4)
    assert grid.target is None
    with pytest.raises(ConfigError, match="have no shares"):
        grid.shares  # noqa: B018


def test_resampling_twice_with_one_seed_draws_the_same(tiny_model):
    texts = [f"{word} of the city was in the water and music of people" for word in ("the", "a", "river", "king")]
    settings = {"metric": METRIC, "by": "resample", "texts": texts, "n_draws": 2, "layers": [0]}
    first, again, other = (ablate(tiny_model, CLEAN, seed=seed, **settings).effects for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_metrics_are_what_they_say(tiny_model, pair):
    logits = tiny_model.logits(pair.clean)
    chances = logits[0, -1].softmax(-1)
    assert float(METRIC(logits)[0]) == pytest.approx(float(logits[0, -1, 20] - logits[0, -1, 30]))
    assert float(probability(20)(logits)[0]) == pytest.approx(float(chances[20]))
    assert float(log_probability([20, 30])(logits)[0]) == pytest.approx(float((chances[20] + chances[30]).log()))
    kl = divergence_from(logits)
    assert float(kl(logits)[0]) == pytest.approx(0, abs=1e-5)
    assert float(kl(tiny_model.logits(pair.corrupt))[0]) > 0.01


def test_the_clean_run_is_at_no_distance_from_itself_when_it_is_restored(tiny_model, pair):
    grid = patch(tiny_model, CLEAN, CORRUPT, metric=divergence_from(tiny_model.logits(pair.clean)))
    assert grid.target == pytest.approx(0, abs=1e-5)
    assert float(grid.effects[-1, -1]) == pytest.approx(-grid.base, abs=1e-4)
    assert grid.metric == "divergence_from"


def test_any_function_of_the_logits_is_a_metric(tiny_model, pair):
    def entropy(logits):
        return torch.distributions.Categorical(logits=logits[:, -1]).entropy()

    grid = patch(tiny_model, CLEAN, CORRUPT, metric=entropy, at="mlp_out", layers=[2])
    assert grid.metric == "entropy"
    assert grid.base == pytest.approx(float(entropy(tiny_model.logits(pair.corrupt))[0]), abs=1e-5)
    assert grid.effects.shape == (1, len(everywhere(pair)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", ["resid_mid", "head", "feature"])
def test_an_exception_leaves_no_trace(tiny_model, pair, features, at, method):
    before = tiny_model.logits(pair.clean)

    def broken(logits):
        raise RuntimeError("the user pressed stop")

    with pytest.raises(RuntimeError, match="stop"):
        patch(tiny_model, CLEAN, CORRUPT, metric=broken, at=at, method=method, features=chosen(at, features))
    assert tiny_model.active_hooks() == []
    torch.testing.assert_close(tiny_model.logits(pair.clean), before, rtol=0, atol=0)


def test_an_exception_in_the_middle_of_a_patched_pass_leaves_no_trace(tiny_model, pair):
    before = tiny_model.logits(pair.clean)
    site = Site(HOOK, (1,))
    calls = []

    def stops_late(logits):
        calls.append(tiny_model.active_hooks())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run_patched(tiny_model, pair.clean, [[(site, torch.zeros(pair.clean.shape[1], 32))]], stops_late)
    assert calls == [[HOOK]]  # the edit was in place
    assert tiny_model.active_hooks() == []
    torch.testing.assert_close(tiny_model.logits(pair.clean), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"layers": [3]}, "layer must be between 0 and 2, got 3"),
        ({"positions": [0]}, "position must be between 1 and"),
        ({"layers": []}, "got none"),
        ({"at": "feature"}, "goes with 0 features"),
        ({"metric": lambda logits: logits[:, -1].argmax(-1).float(), "method": "ig"}, "has no gradient"),
        ({"metric": lambda logits: logits[:, -1, 0] / 0}, "not a finite number"),
        ({"at": "position", "method": "attribution"}, "give method='exact'"),
        ({"method": "ig", "steps": 0}, "at least 1 step"),
        ({"batch_size": 0}, "at least 1 run, got 0"),
    ],
)
def test_what_cannot_be_patched_is_refused_in_a_sentence(tiny_model, arguments, sentence):
    with pytest.raises(ConfigError, match=sentence):
        patch(tiny_model, CLEAN, CORRUPT, **{"metric": METRIC, **arguments})


@pytest.mark.parametrize(("name", "value"), [("at", "resid"), ("method", "exactly"), ("direction", "forwards")])
def test_an_unknown_word_is_refused_with_those_known(tiny_model, name, value):
    with pytest.raises((ConfigError, TypeError)):  # where annotations are checked, these are first
        patch(tiny_model, CLEAN, CORRUPT, metric=METRIC, **{name: value})


def test_a_metric_of_another_shape_is_refused(tiny_model):
    with pytest.raises((ShapeError, TypeError)):
        patch(tiny_model, CLEAN, CORRUPT, metric=lambda logits: logits[:, -1])


def test_features_of_an_sae_of_another_width_are_refused(tiny_model, pair):
    sae = new_sae(TopKConfig(d_sae=8, k=2), d_in=tiny_model.d_model + 1)
    sae.metadata = Metadata(hook_name=HOOK)
    site = Site(HOOK, (1,), feature=sae.feature(0))
    with pytest.raises(ShapeError, match="has width 32, but the SAE of feature 0 reads 33"):
        run_patched(tiny_model, pair.clean, [[(site, torch.zeros(pair.clean.shape[1]))]], METRIC)


def test_bos_is_never_edited(tiny_model, pair):
    site = Site(HOOK, (0, 1))
    with pytest.raises(ConfigError, match="position 0 is"):
        run_patched(tiny_model, pair.clean, [[(site, torch.zeros(pair.clean.shape[1], 32))]], METRIC)


@pytest.mark.parametrize(
    ("settings", "error", "sentence"),
    [
        ({"by": "zero", "texts": ["a"]}, ConfigError, "takes no texts"),
        ({"by": "mean"}, ConfigError, "takes other texts, got 0"),
        ({"by": "mean", "texts": ["<bos>"]}, TextError, "give longer ones"),
        ({"by": "resample", "texts": ["short"]}, TextError, "of 1 texts"),
    ],
)
def test_an_ablation_says_which_texts_it_needs(tiny_model, settings, error, sentence):
    with pytest.raises(error, match=sentence):
        ablate(tiny_model, CLEAN + " and long and great and small", metric=METRIC, **settings)


def test_an_ablation_has_no_second_prompt_to_move_from(tiny_model):
    with pytest.raises(ConfigError, match="an ablation has one"):
        ablate(tiny_model, CLEAN, metric=METRIC, by="zero", method="ig_inputs")
