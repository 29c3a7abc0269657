"""Stability, meta-SAE, baselines, controls and comparisons, each where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saelab.errors import ConfigError
from saelab.evals.baselines import largest_coordinates, projection
from saelab.evals.compare import verdict
from saelab.evals.controls import randomised, shuffled
from saelab.evals.fitting import RowBatches
from saelab.evals.kept import KeptPieces
from saelab.evals.meta import MetaConfig, meta_structure
from saelab.evals.stability import StabilityConfig, partner_cosines, stability
from saelab.sae.architectures import new_sae
from saelab.sae.topk import TopKConfig
from saelab.stats import Interval, best_matching, bootstrap, bootstrap_difference, bootstrap_mean


def sae_of(directions: torch.Tensor):
    sae = new_sae(TopKConfig(d_sae=len(directions), k=1), d_in=directions.shape[1])
    with torch.no_grad():
        sae.W_dec.copy_(directions)
    return sae


def mean(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def test_the_same_features_in_another_order_are_all_found_again():
    directions = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(12)
    everything = torch.ones(12, dtype=torch.bool)
    piece = stability(
        sae_of(directions),
        everything,
        [(sae_of(3 * directions[order]), everything)],
        StabilityConfig(),
        draws=50,
        seed=0,
    )
    assert [score.interval.value for score in piece.scores] == pytest.approx([1.0, 1.0])


def test_half_the_features_found_again_is_one_half():
    eye = torch.eye(8)
    everything = torch.ones(4, dtype=torch.bool)
    other = torch.cat([eye[:2], eye[4:6]])
    piece = stability(sae_of(eye[:4]), everything, [(sae_of(other), everything)], StabilityConfig(), draws=200, seed=0)
    assert piece.scores[0].interval.value == 0.5
    assert piece.scores[0].n == 4


def test_dead_features_do_not_count():
    eye = torch.eye(8)
    live = torch.tensor([True, True, False, False])
    piece = stability(
        sae_of(eye[:4]), live, [(sae_of(torch.cat([eye[:2], eye[6:]])), live)], StabilityConfig(), draws=50, seed=0
    )
    assert (piece.scores[0].interval.value, piece.scores[0].n) == (1.0, 2)


def test_a_partner_is_taken_once_and_a_feature_left_over_has_none():
    directions = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    assert sorted(partner_cosines(directions, torch.tensor([[1.0, 0.0]]))) == pytest.approx([0.0, 1.0])
    assert partner_cosines(-torch.eye(2), torch.eye(2), signed=True) == pytest.approx([1.0, 1.0])


def test_each_feature_gets_the_cosine_of_its_own_partner():
    directions = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.8, 0.6], [0.0, 0.0, 1.0]])
    others = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    assert partner_cosines(directions, others).tolist() == pytest.approx([1.0, 0.8, 1.0])


def test_too_wide_for_the_assignment_is_said():
    everything = torch.ones(4, dtype=torch.bool)
    sae = sae_of(torch.eye(4))
    piece = stability(sae, everything, [(sae, everything)], StabilityConfig(max_features=3), draws=50, seed=0)
    assert "4 live features are more than stability.max_features = 3" in str(piece.skipped)


def test_shared_directions_are_seen_by_a_meta_sae():
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(8, 32, generator=generator), dim=1)
    pairs = torch.combinations(torch.arange(8))
    built = atoms[pairs[:, 0]] + atoms[pairs[:, 1]]
    config = MetaConfig(width_share=0.5, k=2, steps=120, batch_size=28, lr=2e-2)
    values = [
        meta_structure(sae_of(rows), torch.ones(28, dtype=torch.bool), config, draws=50, seed=0)
        .scores[0]
        .interval.value
        for rows in (built, torch.randn(28, 32, generator=generator))
    ]
    assert values[0] > values[1] + 0.2


def test_too_few_features_for_a_meta_sae_is_said():
    piece = meta_structure(sae_of(torch.eye(8)), torch.ones(8, dtype=torch.bool), MetaConfig(), draws=50, seed=0)
    assert "8 live features are too few" in str(piece.skipped)


def test_pca_and_coordinates_in_closed_form():
    mean_ = torch.tensor([1.0, 0.0, 0.0])
    acts = torch.tensor([[4.0, 2.0, -1.0], [1.0, -5.0, 3.0]])
    directions = torch.tensor([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(projection(mean_, directions)(acts), torch.tensor([[1.0, 2.0, 0.0], [1.0, -5.0, 0.0]]))
    torch.testing.assert_close(largest_coordinates(mean_, 1)(acts), torch.tensor([[4.0, 0.0, 0.0], [1.0, -5.0, 0.0]]))
    torch.testing.assert_close(largest_coordinates(mean_, 9)(acts), acts)


def test_a_shuffle_keeps_each_coordinate_and_loses_what_connects_them():
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(500, 1, generator=generator) @ torch.ones(1, 3)
    mixed = shuffled(acts, seed=0)
    torch.testing.assert_close(mixed.sort(0).values, acts.sort(0).values, rtol=0, atol=0)
    assert torch.corrcoef(mixed.T)[0, 1].abs() < 0.2
    torch.testing.assert_close(mixed, shuffled(acts, seed=0), rtol=0, atol=0)


def test_a_model_with_random_weights_keeps_the_scale_and_loses_the_rest(tiny_model):
    ids = torch.arange(5, 25)[None]
    before = tiny_model.logits(ids)
    drawn, again, other = (randomised(tiny_model, seed=seed) for seed in (0, 0, 1))
    torch.testing.assert_close(tiny_model.logits(ids), before, rtol=0, atol=0)
    torch.testing.assert_close(drawn.logits(ids), again.logits(ids), rtol=0, atol=0)
    assert not torch.allclose(drawn.logits(ids), other.logits(ids))
    assert "random weights" in drawn.name
    for (name, ours), theirs in zip(tiny_model.bridge.named_parameters(), drawn.bridge.parameters(), strict=True):
        assert not torch.equal(ours, theirs), name
        assert float(theirs.std()) == pytest.approx(float(ours.std()), rel=0.5), name


def test_rows_in_memory_come_once_an_epoch():
    batches = RowBatches(torch.arange(30).float()[:, None], batch_size=10, seed=0)
    epochs = [sorted(int(x) for step in range(3 * e, 3 * e + 3) for x in batches.at(step)[:, 0]) for e in range(2)]
    assert epochs == [list(range(30))] * 2
    assert not torch.equal(batches.at(0), batches.at(3))
    with pytest.raises(ConfigError, match="between 1 and the 30 rows"):
        RowBatches(torch.zeros(30, 1), batch_size=31, seed=0)


def test_differences_inside_the_noise_are_not_ranked():
    assert verdict("explained_variance", Interval(0.01, -0.01, 0.03)) == "not distinguishable"
    assert verdict("explained_variance", Interval(0.0, 0.0, 0.0)) == "not distinguishable"
    assert verdict("explained_variance", Interval(0.02, 0.01, 0.03)) == "better"
    assert verdict("ce_sae", Interval(0.02, 0.01, 0.03)) == "worse"
    assert verdict("l1", Interval(0.02, 0.01, 0.03)) == "higher"


def test_pairing_removes_what_makes_a_sequence_hard_for_both():
    rng = np.random.default_rng(0)
    hardness = rng.normal(size=200)
    first, second = (np.column_stack([hardness + shift, np.ones(200)]) for shift in (0.1, 0.0))
    paired = bootstrap_difference(mean, first, second, paired=True)
    assert paired == pytest.approx((0.1, 0.1, 0.1))
    apart = bootstrap_difference(mean, first, second, paired=False)
    assert apart.low < 0 < apart.high
    with pytest.raises(ValueError, match="the same clusters, got 200 and 199"):
        bootstrap_difference(mean, first, second[1:], paired=True)


def test_strata_weigh_alike_whatever_their_size():
    strata = [np.column_stack([np.zeros(1000), np.ones(1000)]), np.column_stack([np.ones(10), np.ones(10)])]
    assert bootstrap_mean(mean, strata, draws=50).value == 0.5
    assert bootstrap_mean(mean, strata[:1], draws=50) == bootstrap(mean, strata[0], draws=50)
    with pytest.raises(ValueError, match="at least one stratum"):
        bootstrap_mean(mean, [])


def test_the_assignment_is_the_best_one():
    from itertools import permutations

    similarity = np.random.default_rng(0).random((5, 5))
    found = best_matching(similarity)
    best = max(sum(similarity[range(5), p]) for p in permutations(range(5)))
    assert similarity[found.left, found.right].sum() == pytest.approx(best)


def test_finished_pieces_are_found_again_unless_something_changed(tmp_path):
    made: list[int] = []

    def make() -> dict:
        made.append(1)
        return {"n": len(made)}

    first = KeptPieces(tmp_path / "eval", {"tokens": 5})
    assert first.get("core", make) == first.get("core", make) == {"n": 1}
    assert KeptPieces(tmp_path / "eval", {"tokens": 5}).get("core", make) == {"n": 1}
    assert KeptPieces(tmp_path / "eval", {"tokens": 6}).get("core", make) == {"n": 2}
    first.discard()
    assert list(tmp_path.iterdir()) == []
