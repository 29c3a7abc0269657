from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.features.codes import Pairs
from saelab.features.config import IndexConfig
from saelab.features.examples import IntervalExamples, interval_examples, windows
from saelab.features.scan import found_features, new_search
from saelab_kernels.search.hashing import hash64

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


def sampled(values: np.ndarray, *, seed: int = 0, per_interval: int = 2) -> IntervalExamples:
    """Of one value for each feature and place, [features, places]; 0 where a feature does not fire."""
    wanted = IndexConfig(per_interval=per_interval, seed=seed)
    search = new_search(len(values), values.shape[1], wanted)
    features, places = np.nonzero(values)
    search.add(*(torch.from_numpy(column) for column in (features, places, values[features, places])))
    found = found_features(search)
    return interval_examples(found.sample, found.max, n_intervals=4)


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 4.0))
def test_interval_examples_are_the_smallest_hashes_of_their_interval(seed, spread):
    rng = np.random.default_rng(seed)
    values = np.where(rng.random((6, 300)) < 0.4, rng.lognormal(0, spread, (6, 300)), 0).astype(np.float32)
    values[2] = 0
    found = sampled(values)
    for i, (chosen, edges) in enumerate(zip(found.positions, found.edges, strict=True)):
        places = np.flatnonzero(values[i])
        interval = np.searchsorted(edges[1:-1], values[i, places], side="right")
        for j in range(4):
            inside = places[interval == j]
            keys = hash64(0, np.full(len(inside), i), inside)
            expected = inside[np.argsort(keys)][:2].tolist()
            assert chosen[j].tolist() == expected + [-1] * (2 - len(expected))


@given(st.floats(2.0**-10, 2.0**17, width=32))
def test_intervals_are_octaves_down_from_the_maximum(maximum):
    edges = sampled(np.array([[maximum]], np.float32)).edges[0]
    assert edges[0] == 0
    assert edges[-1] == maximum
    np.testing.assert_allclose(edges[2:-1] / edges[1:-2], 2)
    assert 0.5 <= edges[-2] / maximum <= 0.75


def test_a_sample_depends_on_the_seed():
    values = np.random.default_rng(1).lognormal(0, 1, (3, 200)).astype(np.float32)
    assert (sampled(values).positions == sampled(values).positions).all()
    assert (sampled(values, seed=1).positions != sampled(values).positions).any()


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 14), st.integers(0, 13))
def test_windows_show_the_tokens_and_activations_around_the_peak(seed, window, after):
    after = min(after, window - 1)
    rng = np.random.default_rng(seed)
    pairs, dense = random_pairs(rng)
    tokens = rng.integers(0, 99, (8, CONTEXT)).astype(np.int32)
    positions = rng.integers(-1, dense[0].size, (len(dense), 3))
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
