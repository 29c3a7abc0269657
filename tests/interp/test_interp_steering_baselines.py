from __future__ import annotations

import numpy as np
import pytest
import torch

from saelab.activations.capture import CacheConfig, capture
from saelab.activations.text import TextConfig
from saelab.errors import ConfigError
from saelab.interp.steering_baselines import (
    directions,
    features_of_equal_density,
    firings,
    instructions,
    random_directions,
)
from saelab.sae.base import Metadata
from saelab.sae.topk import TopK, TopKConfig

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def store(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines")
    rng = np.random.default_rng(0)
    words = ["feet", "inches", "river", "ran", "long", "the", "of"]
    for i in range(6):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 150)))
    settings = CacheConfig(
        model=tiny_model.name, hook_names=(HOOK,), text=TextConfig(source=str(folder)), tokens=2048, context=32
    )
    return capture(settings, folder / "activations", model=tiny_model)


@pytest.fixture(scope="module")
def sae(store) -> TopK:
    sae = TopK(TopKConfig(d_sae=48, k=6), store.d_in(HOOK), generator=torch.Generator().manual_seed(0))
    sae.metadata = Metadata(hook_name=HOOK)
    return sae


@pytest.fixture(scope="module")
def everything(sae, store):
    acts = store.acts(HOOK, store.rows("all"))[:, 1:].flatten(0, 1).float()
    return acts, sae.encode(acts).detach()


def sometimes(codes: torch.Tensor) -> list[int]:
    """Features that fire on a fair share of the tokens, at different heights."""
    share = (codes > 0).float().mean(0)
    return torch.nonzero((share > 0.1) & (share < 0.9)).flatten()[:2].tolist()


def test_firings_are_the_tokens_above_the_threshold_in_the_order_of_the_store(sae, store, everything):
    acts, codes = everything
    chosen = sometimes(codes)
    clear = {i: float(codes[:, i].max()) / 2 for i in chosen}
    found = firings(sae, store, clear, n_others=300)
    for i in chosen:
        torch.testing.assert_close(found.firing[i], acts[codes[:, i] > clear[i]], rtol=0, atol=0)
    assert 200 < len(found.others) < 400
    for i in chosen:
        again = sae.encode(found.others)[:, i] > 0
        assert torch.equal(found.fires_on_others[i], again)
        assert 0 < again.sum() < len(again)


def test_at_most_so_many_firings_are_kept(sae, store, everything):
    acts, codes = everything
    i = sometimes(codes)[0]
    found = firings(sae, store, {i: 0.0}, n_others=50, most=7)
    assert torch.equal(found.firing[i], acts[codes[:, i] > 0][:7])


def test_the_mean_difference_is_between_firing_and_silent_tokens(sae, store, everything):
    i = sometimes(everything[1])[0]
    found = firings(sae, store, {i: 0.0}, n_others=400)
    both = directions(found, i)
    silent = found.others[~found.fires_on_others[i]]
    expected = found.firing[i].double().mean(0) - silent.double().mean(0)
    np.testing.assert_allclose(both.mean_difference, expected.numpy(), rtol=1e-6, atol=1e-9)
    assert (both.n_firing, both.n_others) == (len(found.firing[i]), len(silent))
    scores = torch.cat([found.firing[i], silent]).double() @ torch.from_numpy(both.probe)
    assert scores[: both.n_firing].mean() > scores[both.n_firing :].mean()


def test_a_feature_that_never_fires_clearly_is_refused(sae, store):
    with pytest.raises(ConfigError, match="does not fire above 1e\\+09 anywhere"):
        firings(sae, store, {0: 1e9})


def test_random_features_have_the_nearest_densities():
    density = np.array([0.0, 0.5, 0.011, 0.01, 0.009, 0.012, 0.0001, 0.3])
    drawn = {i for seed in range(30) for i in features_of_equal_density(np.tile(density, 20), 3, 1, seed=seed)}
    assert drawn <= {i for i in range(160) if i % 8 == 3 and i != 3}  # ten are drawn from, and 19 have the very density
    assert len(drawn) > 3
    assert features_of_equal_density(density, 3, 2, exclude=[2, 4], seed=1) == sorted(
        features_of_equal_density(density, 3, 2, exclude=[2, 4], seed=1)
    )
    assert not set(features_of_equal_density(density, 3, 4, exclude=[2, 4])) & {0, 2, 3, 4}


def test_a_silent_feature_has_none_of_equal_density():
    density = np.array([0.0, 0.1, 0.2])
    with pytest.raises(ConfigError, match="density 0 and 2 others fire"):
        features_of_equal_density(density, 0, 1)
    with pytest.raises(ConfigError, match="lower n_twins"):
        features_of_equal_density(density, 1, 2)


def test_instructions_name_each_word_once():
    texts = instructions([" next", "next", " adjacent"])
    assert texts["prompt: write about"] == 'Write about "next", "adjacent". '
    assert texts["prompt: words twice"] == "next adjacent. next adjacent. "
    assert all(text.endswith(" ") for text in texts.values())


def test_random_directions_are_repeatable_and_others_with_another_seed():
    a, again, b = (random_directions(3, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, again)
    assert not torch.equal(a, b)
