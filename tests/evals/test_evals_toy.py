"""Toy worlds, and how their recovery is scored."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError, ShapeError
from saelab.evals.recovery import cosine_matrix, firing_f1, recovery
from saelab.evals.toy import ToyBatches, ToyConfig
from saelab.evals.toy_suite import ToySuiteConfig, single_input, tried, worlds

KINDS = ("independent", "hierarchical", "correlated")


def codes_of(world: ToyBatches, n_batches: int = 40) -> torch.Tensor:
    return torch.cat([world.sample(step).codes for step in range(n_batches)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_a_world_fires_as_often_as_it_says(kind: str, exponent: float):
    world = ToyBatches(ToyConfig(kind=kind, exponent=exponent))
    fires = codes_of(world) != 0
    assert fires.sum(1).float().mean().item() == pytest.approx(4.0, abs=0.1)
    frequency = fires.float().mean(0)
    torch.testing.assert_close(frequency, world.frequency, atol=0.012, rtol=0.05)


def test_frequencies_follow_the_power_law():
    frequency = ToyBatches(ToyConfig(exponent=0.5)).frequency
    torch.testing.assert_close(frequency[3] / frequency[99], torch.tensor((100 / 4) ** 0.5))


def test_activations_are_the_sum_of_what_fires():
    sample = ToyBatches(ToyConfig()).sample(3)
    assert (sample.codes[sample.codes != 0] >= 0.5).all()
    assert sample.codes.max() <= 1.5
    world = ToyBatches(ToyConfig())
    torch.testing.assert_close(world.directions.norm(dim=1), torch.ones(256))
    torch.testing.assert_close(sample.acts, sample.codes @ world.directions)


def test_a_child_fires_only_with_its_parent():
    world = ToyBatches(ToyConfig(kind="hierarchical"))
    fires = codes_of(world, 10) != 0
    children = ~world.is_parent
    assert fires[:, children].any()
    assert not (fires[:, children] & ~fires[:, world.group[children]]).any()


def test_features_of_a_group_fire_together_more_often_than_by_chance():
    world = ToyBatches(ToyConfig(kind="correlated"))
    fires = (codes_of(world) != 0).float()
    together = fires.T @ fires / len(fires)
    chance = torch.outer(world.frequency, world.frequency)
    same = (world.group[:, None] == world.group) & ~torch.eye(256, dtype=torch.bool)
    assert (together[same].sum() / chance[same].sum()).item() > 3
    others = world.group[:, None] != world.group
    assert (together[others].sum() / chance[others].sum()).item() == pytest.approx(1.0, abs=0.1)


def test_a_batch_depends_on_seed_and_step_alone():
    first, again = ToyBatches(ToyConfig(seed=3)), ToyBatches(ToyConfig(seed=3))
    again.at(0)
    torch.testing.assert_close(first.at(7), again.at(7), rtol=0, atol=0)
    assert not torch.equal(first.at(7), first.at(8))
    assert not torch.equal(first.at(7), ToyBatches(ToyConfig(seed=4)).at(7))


def test_the_truth_itself_scores_one_in_any_order():
    world = ToyBatches(ToyConfig())
    fires = codes_of(world, 4) != 0
    order = torch.randperm(256)
    found = recovery(world.directions, world.directions[order], fires, fires[:, order])
    assert found == pytest.approx((1.0, 1.0, 1.0), abs=1e-6)


def test_two_true_features_cannot_share_a_partner():
    truth = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.2]]), dim=1)
    decoder = torch.tensor([[1.0, 0.1], [0.0, -1.0]])
    fires = torch.ones(3, 2, dtype=torch.bool)
    found = recovery(truth, decoder, fires, fires)
    best = cosine_matrix(truth, decoder)[:, 0].mean().item()
    assert found.mean_max_cosine == pytest.approx(best)
    assert found.mcc < best - 0.4


def test_a_narrow_sae_leaves_true_features_without_partner():
    fires = torch.ones(4, 2, dtype=torch.bool)
    found = recovery(torch.eye(2), torch.eye(2)[:1], fires, fires[:, :1])
    assert found.mcc == pytest.approx(0.5)
    assert found.matched_f1 == pytest.approx(0.5)


def test_opposite_directions_count_only_for_signed_activations():
    fires = torch.ones(4, 2, dtype=torch.bool)
    assert recovery(torch.eye(2), -torch.eye(2), fires, fires).mcc < 0.1
    assert recovery(torch.eye(2), -torch.eye(2), fires, fires, signed=True).mcc == pytest.approx(1.0)


def test_f1_of_firing_in_closed_form():
    fires = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 0]], dtype=torch.bool)
    found = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 0]], dtype=torch.bool)
    assert firing_f1(fires, found).tolist() == [0.5, 0.0]


def test_scores_of_different_tokens_are_refused():
    fires = torch.ones(4, 2, dtype=torch.bool)
    with pytest.raises(ShapeError, match="4 tokens, but the SAE 2 and 3"):
        recovery(torch.eye(2), torch.eye(2), fires, fires[:3])


def test_an_untrained_sae_scores_low_and_a_little_training_helps():
    world = ToyConfig(n_features=24, d=16, l0=2.0, batch_size=256)
    few, many = (
        tried("small", world, "topk", ToySuiteConfig(tokens=tokens, d_sae=32), seed=0) for tokens in (256, 40_000)
    )
    assert many.recovery.mcc > few.recovery.mcc + 0.2
    assert many.explained_variance > few.explained_variance
    assert many.l0 <= 2.0


def test_the_table_has_every_single_input_architecture_and_four_worlds():
    assert {"topk", "batchtopk", "relu"} <= set(single_input())
    assert not {"transcoder", "crosscoder"} & set(single_input())
    assert [world.kind for world in worlds(ToyConfig()).values()] == [
        "independent",
        "independent",
        "hierarchical",
        "correlated",
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"n_features": 1}, "at least 2 features"),
        ({"l0": 100.0}, "at most a quarter of n_features=256, got 100"),
        ({"correlation": 1.0}, "correlation must be at least 0 and below 1"),
        ({"magnitudes": (2.0, 1.0)}, "in order, got 2.0 and 1.0"),
        ({"group_size": 0}, "group_size must be between 1"),
        ({"exponent": -1.0}, "exponent must be between 0 and 3"),
    ],
)
def test_impossible_worlds_are_refused(settings: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        ToyConfig(**settings)


def test_an_unknown_architecture_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean topk"):
        ToySuiteConfig(arch=("topkk",))


@pytest.mark.long
@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka"])
def test_known_features_are_recovered(arch: str):
    """256 true features in 96 dimensions, frequencies falling as the square root, L0 4; an SAE of 320 features."""
    found = tried("exponent 0.5", ToyConfig(), arch, ToySuiteConfig(), seed=0)
    assert found.recovery.mean_max_cosine >= 0.95
    assert found.recovery.mcc >= 0.95
