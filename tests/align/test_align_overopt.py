"""Over-optimisation: a hump in every seed where the proxy cannot express the gold reward, and none where it can."""

import itertools
import math

import numpy as np
import pytest

from saelab.align import overopt
from saelab.align.density import preferred_density
from saelab.align.overopt import OveroptConfig, overoptimise
from saelab.errors import ConfigError

SEEDS = range(5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_misspecified_proxy_goes_on_rising_while_gold_falls(seed):
    result = overoptimise(OveroptConfig(seed=seed))
    for curve, drop in ((result.exact, 1.0), (result.best_of_n, 0.5)):
        proxies = [point.proxy for point in curve.points]
        assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(proxies))
        assert curve.points[0] is not curve.peak
        assert curve.points[-1] is not curve.peak
        assert curve.drop > drop
    assert result.exact.fit.r_squared > 0.9
    assert result.best_of_n.fit.r_squared > 0.9
    assert result.exact.fit.beta > 0
    assert result.proxy_accuracy > 0.8


@pytest.mark.parametrize("seed", SEEDS)
def test_a_proxy_that_can_express_gold_shows_no_hump(seed):
    result = overoptimise(OveroptConfig(seed=seed, proxy="well_specified", n_pairs=3000))
    assert result.best_of_n.drop < 0.05
    assert result.exact.drop < 0.5


def test_more_labels_do_not_cure_a_proxy_of_the_wrong_form():
    assert overoptimise(OveroptConfig(n_pairs=20_000)).exact.drop > 3


def test_ppo_walks_along_the_exact_frontier():
    config = OveroptConfig(betas=(1.0, 0.5, 0.25, 0.12), ppo=True, ppo_steps=100)
    result = overoptimise(config)
    for exact, trained in zip(result.exact.points, result.ppo.points, strict=True):
        assert trained.proxy == pytest.approx(exact.proxy, abs=0.25)
        assert trained.gold == pytest.approx(exact.gold, abs=0.6)
    assert result.ppo.drop > 1


def test_the_counts_stand_for_all_answers():
    world = overopt._world()
    assert np.exp(world.ref_logp).sum() == pytest.approx(1)
    rng = np.random.default_rng(0)
    answers = rng.integers(overopt.VOCABULARY, size=(200_000, overopt.LENGTH))
    counts = np.stack([(answers == token).sum(1) for token in range(3)], 1)
    sampled = overopt.gold_reward(counts)
    exact = np.exp(world.ref_logp) @ world.gold
    assert sampled.mean() == pytest.approx(exact, abs=4 * sampled.std() / math.sqrt(len(sampled)))


def test_best_of_n_is_what_drawing_n_answers_gives():
    world = overopt._world()
    proxy = overopt._standardised(world.counts @ np.array([0.5, -0.5, 1.0]), world)
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(proxy), size=(40_000, 16), p=np.exp(world.ref_logp))
    best = drawn[np.arange(len(drawn)), np.round(proxy, 9)[drawn].argmax(1)]
    point = overopt._best_of(world, proxy, 16)
    assert proxy[best].mean() == pytest.approx(point.proxy, abs=0.02)
    assert world.gold[best].mean() == pytest.approx(point.gold, abs=0.05)
    assert overopt._best_of(world, proxy, 1).kl == 0


@pytest.mark.parametrize("options", [{"n_pairs": 1}, {"betas": (1.0, 0.0)}, {"best_of": (0,)}])
def test_settings_without_meaning_are_refused(options):
    with pytest.raises(ConfigError, match="must be"):
        OveroptConfig(**options)


# --- DPO on a line


def test_the_line_goes_from_the_reference_to_the_best_place_as_beta_falls():
    far, near = preferred_density(good=1.0, bad=-1.0, beta=1e6), preferred_density(good=1.0, bad=-1.0, beta=1e-3)
    np.testing.assert_allclose(far.policy, far.reference, rtol=1e-5)
    assert far.kl == pytest.approx(0, abs=1e-9)
    assert near.x[near.policy.argmax()] == near.x[near.reward.argmax()]
    kls = [preferred_density(good=1.0, bad=-1.0, beta=beta).kl for beta in (4.0, 1.0, 0.25, 0.05)]
    assert kls == sorted(kls)


def test_no_other_density_has_a_better_balance_of_reward_and_kl():
    """The optimum beats random neighbours on E[reward] - beta KL, which is strictly concave."""
    beta = 0.3
    best = preferred_density(good=1.5, bad=-0.5, beta=beta, n_grid=101)
    spacing = best.x[1] - best.x[0]
    ref, rng = best.reference * spacing, np.random.default_rng(0)

    def balance(probs):
        return probs @ best.reward - beta * probs @ np.log(probs / ref)

    optimum = balance(best.policy * spacing)
    assert optimum == pytest.approx(best.mean_reward - beta * best.kl)
    for _ in range(50):
        other = best.policy * spacing * np.exp(0.1 * rng.normal(size=len(ref)))
        assert balance(other / other.sum()) < optimum
    for density in (best.reference, best.policy):
        assert density.sum() * spacing == pytest.approx(1)


def test_a_line_without_a_pull_is_refused():
    with pytest.raises(ConfigError, match="beta must be above 0"):
        preferred_density(good=1.0, bad=-1.0, beta=0.0)
