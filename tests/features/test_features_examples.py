from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.features.codes import Pairs
from saelab.features.examples import hash64, interval_positions, top_positions, windows
from saelab.features.statistics import activation_bin, feature_statistics

CONTEXT = 10


def random_pairs(rng, n_features=6, n_rows=8, share=0.4) -> tuple[Pairs, np.ndarray]:
    """Pairs and their dense matrix [features, rows, context]; few distinct values, so that ties abound."""
    shape = (n_features, n_rows, CONTEXT)
    dense = np.where(rng.random(shape) < share, rng.integers(1, 5, shape), 0).astype(np.float32)
    dense[:, :, 0] = 0
    flat = dense.reshape(n_features, -1)
    features, positions = np.nonzero(flat)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(features, minlength=n_features))])
    return Pairs(offsets, positions.astype(np.int32), flat[features, positions]), dense


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 10), st.floats(0, 0.9))
def test_top_examples_are_the_highest_of_each_row_by_value_and_then_by_position(seed, n, share):
    pairs, dense = random_pairs(np.random.default_rng(seed), share=share)
    for found, feature in zip(top_positions(pairs, context=CONTEXT, n=n), dense, strict=True):
        peaks = [(-row.max(), r * CONTEXT + int(row.argmax())) for r, row in enumerate(feature) if row.max() > 0]
        expected = [position for _, position in sorted(peaks)][:n]
        assert found.tolist() == expected + [-1] * (n - len(expected))


def sampled(pairs, *, first_feature=0, seed=0, per_interval=2, store_positions=None):
    return interval_positions(
        pairs,
        feature_statistics(pairs, n_bins=4).max,
        n_intervals=4,
        per_interval=per_interval,
        seed=seed,
        first_feature=first_feature,
        store_positions=np.arange(8 * CONTEXT) if store_positions is None else store_positions,
    )


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_interval_examples_are_the_smallest_hashes_of_their_interval(seed):
    pairs, dense = random_pairs(np.random.default_rng(seed))
    for i, (found, feature) in enumerate(zip(sampled(pairs), dense.reshape(len(dense), -1), strict=True)):
        positions = np.flatnonzero(feature)
        bins = activation_bin(feature[positions], np.full(len(positions), feature.max(initial=0)), 4)
        for j in range(4):
            inside = positions[bins == j]
            keys = hash64(0, np.full(len(inside), i), inside)
            expected = inside[np.argsort(keys)][:2].tolist()
            assert found[j].tolist() == expected + [-1] * (2 - len(expected))


def test_a_sample_depends_on_the_seed_and_not_on_the_blocks():
    pairs, _ = random_pairs(np.random.default_rng(1), n_rows=8)
    whole = sampled(pairs)
    cut = pairs.offsets[2]
    rest = Pairs(pairs.offsets[2:] - cut, pairs.positions[cut:], pairs.values[cut:])
    np.testing.assert_array_equal(sampled(rest, first_feature=2), whole[2:])
    assert (sampled(pairs, seed=1) != whole).any()


def test_samples_are_uniform():
    n = 20_000
    pairs = Pairs(np.array([0, n]), np.arange(n, dtype=np.int32), np.full(n, 1, np.float32))
    chosen = sampled(pairs, per_interval=1000, store_positions=np.arange(n))[0, 3]
    assert len(np.unique(chosen)) == 1000
    # the mean of 1,000 uniform draws lies within five standard errors
    assert chosen.mean() == pytest.approx(n / 2, abs=5 * n / np.sqrt(12 * 1000))


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 14), st.integers(0, 13))
def test_windows_show_the_tokens_and_activations_around_the_peak(seed, window, after):
    after = min(after, window - 1)
    rng = np.random.default_rng(seed)
    pairs, dense = random_pairs(rng)
    tokens = rng.integers(0, 99, (8, CONTEXT)).astype(np.int32)
    positions = top_positions(pairs, context=CONTEXT, n=3)
    found = windows(pairs, positions, tokens, window=window, after=after)
    for i, slots in enumerate(positions):
        for slot, position in enumerate(slots):
            shown = found.token_ids[i, slot]
            if position < 0:
                assert (shown == -1).all()
                assert (found.acts[i, slot] == 0).all()
                continue
            row, column = divmod(position, CONTEXT)
            width = min(window, CONTEXT)
            first = column - found.peaks[i, slot]
            assert 0 <= first <= CONTEXT - width
            assert shown[:width].tolist() == tokens[row, first : first + width].tolist()
            assert found.acts[i, slot, :width].tolist() == dense[i, row, first : first + width].tolist()
            assert (shown[width:] == -1).all()
            if width - 1 <= column < CONTEXT - after:
                assert column - first == max(width - 1 - after, 0) or width < window


def test_hashes_differ_by_seed_feature_and_position():
    grid = np.stack(np.meshgrid(np.arange(50), np.arange(50)), -1).reshape(-1, 2)
    keys = np.concatenate([hash64(seed, grid[:, 0], grid[:, 1]) for seed in (0, 1)])
    assert len(np.unique(keys)) == 5000
    assert abs((keys < 2**63).mean() - 0.5) < 0.05
