"""Top activations, histograms and samples: against plain sorting, in any order, chunking and sharding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab_kernels import search
from saelab_kernels.search import hashing, reference
from saelab_kernels.search.stream import FeatureSearch, Found, SearchSettings
from saelab_kernels.search.types import Bins, Firings, empty_tally, empty_top

WANTED = SearchSettings(
    n_top=5, row_length=10, bins=Bins(per_octave=8, lowest=-3, n_octaves=6), group=4, n_sampled=3, seed=7
)


def firings(seed: int, n_features: int = 7, n_positions: int = 200, share: float = 0.3) -> Firings:
    """Pairs by position; values repeat, feature 3 never fires, and feature 0 does everywhere."""
    rng = np.random.default_rng(seed)
    fires = rng.random((n_positions, n_features)) < share
    fires[:, 3 % n_features], fires[:, 0] = False, True
    positions, features = np.nonzero(fires)
    values = rng.integers(1, 40, len(features)).astype(np.float32) / 4
    return Firings(torch.from_numpy(features), torch.from_numpy(positions), torch.from_numpy(values))


def part(pairs: Firings, chosen: torch.Tensor) -> Firings:
    return Firings(*(column[chosen] for column in pairs))


def searched(chunks: list[Firings], wanted: SearchSettings = WANTED, n_features: int = 7) -> FeatureSearch:
    found = FeatureSearch(n_features, wanted)
    for chunk in chunks:
        found.add(*chunk)
    return found


def assert_same(left: Found, right: Found) -> None:
    for mine, theirs in zip(left, right, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)


def by_row(pairs: Firings, row_length: int) -> list[Firings]:
    rows = pairs.positions // row_length
    return [part(pairs, rows == row) for row in rows.unique()]


@pytest.mark.parametrize("path", ["reference", "cpu"])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 33, 300])
def test_the_top_are_the_highest_and_of_equals_the_first(path, m, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    pairs = firings(m)
    state = empty_top(7, m)
    order = torch.randperm(len(pairs.features))
    for chosen in order.chunk(4):
        passing = search.scan_top(*part(pairs, chosen), state.threshold)
        before = state.clone()
        merged = search.merge_top(state, *passing)
        for mine, same in zip(state, before, strict=True):
            assert torch.equal(mine, same)
        state = merged
    for feature in range(7):
        mine = part(pairs, pairs.features == feature)
        best = sorted(zip(mine.values.tolist(), mine.positions.tolist(), strict=True), key=lambda p: (-p[0], p[1]))[:m]
        n = len(best)
        assert list(zip(state.values[feature, :n].tolist(), state.positions[feature, :n].tolist(), strict=True)) == best
        assert (state.positions[feature, n:] == -1).all()
        assert (state.values[feature, n:] == 0).all()
        assert state.threshold[feature] == state.values[feature, m - 1]


@pytest.mark.parametrize(
    ("n_features", "n_positions", "m"), [(1, 1, 1), (1, 900, 7), (129, 33, 5), (1000, 7, 3), (70_000, 3, 2)]
)
def test_the_tuned_path_is_the_reference_to_the_bit(n_features, n_positions, m):
    pairs = firings(0, n_features, n_positions)
    old, new = part(pairs, pairs.positions % 2 == 0), part(pairs, pairs.positions % 2 == 1)
    states = []
    for merge in (reference.merge_top_, search.merge_top_):
        state = merge(empty_top(n_features, m), *old)
        states.append(merge(state, *new))
    for left, right in zip(*states, strict=True):
        assert torch.equal(left, right)
    drawn = []
    for hist_sample in (reference.hist_sample, search.hist_sample):
        tally = empty_tally(n_features, WANTED.bins)
        hashes = hashing.feature_hash_bits(3, n_features, torch.device("cpu"))
        arguments = {"tally": tally, "bins": WANTED.bins, "feature_hash": hashes, "group": 4}
        drawn.append((*tally, *hist_sample(*pairs, **arguments)))
    for left, right in zip(*drawn, strict=True):
        assert torch.equal(left, right)
    peaks = [peaks_of(*pairs, row_length=3) for peaks_of in (reference.row_peaks, search.row_peaks)]
    for left, right in zip(*peaks, strict=True):
        assert torch.equal(left, right)


def test_merging_is_associative_and_commutative_and_leaves_its_argument():
    parts = [part(firings(0), firings(0).positions % 3 == i) for i in range(3)]
    empty = empty_top(7, 4)
    states = [search.merge_top(empty, *pairs) for pairs in parts]
    assert (empty.positions == -1).all()
    a, b, c = states
    left = search.merge_top(search.merge_top(a, *b.kept()), *c.kept())
    right = search.merge_top(c, *search.merge_top(b, *a.kept()).kept())
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("path", ["reference", "cpu"])
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), n_chunks=st.integers(1, 20), data=st.data())
def test_a_search_finds_the_same_in_any_chunks_and_order(path, seed, n_chunks, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAELAB_KERNELS", path)
        rows = by_row(firings(seed), 10)
        shuffled = data.draw(st.permutations(rows))
        step = -(-len(rows) // n_chunks)
        chunks = [
            Firings(*map(torch.cat, zip(*shuffled[i : i + step], strict=True))) for i in range(0, len(rows), step)
        ]
        assert_same(searched(chunks).found(), searched([firings(seed)]).found())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 99), cut=st.integers(0, 20), interruptions=st.lists(st.integers(0, 19), max_size=4))
def test_shards_combined_and_searches_interrupted_find_the_same(seed, cut, interruptions):
    rows = by_row(firings(seed), 10)
    whole = searched(rows).found()
    shard = searched(rows[:cut])
    shard.combine(searched(rows[cut:]))
    assert_same(shard.found(), whole)
    resumed = searched([])
    for i, row in enumerate(rows):
        resumed.add(*row)
        if i in interruptions:
            saved, resumed = resumed.tensors(), searched([])
            resumed.restore(saved)
    assert_same(resumed.found(), whole)


def test_a_row_has_one_place_among_the_top_its_highest_and_first():
    pairs = firings(1)
    top = searched([pairs]).found().top
    for feature in range(7):
        mine = part(pairs, pairs.features == feature)
        peaks = []
        for row in mine.positions.div(10, rounding_mode="floor").unique():
            inside = part(mine, mine.positions // 10 == row)
            best = inside.values.max()
            peaks.append((-best.item(), inside.positions[inside.values == best].min().item()))
        expected = [position for _, position in sorted(peaks)][:5]
        assert top.positions[feature, : len(expected)].tolist() == expected


def test_small_buffers_and_large_ones_find_the_same(monkeypatch):
    rows, whole = by_row(firings(2), 10), searched(by_row(firings(2), 10)).found()
    monkeypatch.setattr("saelab_kernels.search.stream._LEAST", 1)
    monkeypatch.setattr("saelab_kernels.search.stream._MOST", 1)
    assert_same(searched(rows).found(), whole)


@pytest.mark.parametrize("path", ["reference", "cpu"])
def test_counts_and_means_are_those_of_the_values(path, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.lognormal(0, 8, 3000).astype(np.float32))
    features = torch.from_numpy(rng.integers(0, 5, 3000))
    tally = searched([Firings(features, torch.arange(3000), values)]).found().tally
    bins = WANTED.bins
    for feature in range(5):
        mine = values[features == feature].double()
        assert tally.n_fired[feature] == len(mine)
        assert tally.means()[feature].item() == pytest.approx(mine.mean().item(), rel=1e-14)
        edges = torch.cat([torch.zeros(1), bins.lower_edge(torch.arange(1, bins.n_bins)), torch.tensor([torch.inf])])
        expected, _ = np.histogram(mine.numpy(), edges.double().numpy())
        assert tally.counts[feature].tolist() == expected.tolist()
    assert tally.means()[5] == tally.n_fired[5] == 0


def test_means_do_not_depend_on_the_order_in_the_last_bit():
    values = torch.from_numpy(np.random.default_rng(0).lognormal(0, 3, 10_000).astype(np.float32))
    found = []
    for order in (torch.arange(10_000), torch.randperm(10_000)):
        pairs = Firings(torch.zeros(10_000, dtype=torch.int64), order, values[order])
        found.append(searched([pairs]).found().tally.means()[0].item())
    assert found[0] == found[1]


@given(st.floats(2.0**-126, 2.0**127, width=32), st.sampled_from([1, 2, 32, 512]))
def test_a_bin_begins_at_or_below_its_values_and_ends_above(value, per_octave):
    bins = Bins(per_octave=per_octave, lowest=-10, n_octaves=20)
    index = bins.of(torch.tensor([value]))
    assert 0 <= index < bins.n_bins
    low, high = bins.lower_edge(index), bins.lower_edge(index + 1)
    assert value >= low or index == 0
    assert value < high or index == bins.n_bins - 1
    assert high / low <= 1 + 1 / per_octave + 1e-6


def test_a_quantile_read_from_the_histogram_is_off_by_less_than_a_bin():
    values = torch.from_numpy(np.random.default_rng(1).lognormal(0, 1, 20_000).astype(np.float32))
    bins = Bins()
    index = bins.of(values)
    middle = (bins.lower_edge(index) + bins.lower_edge(index + 1)) / 2
    assert ((middle / values - 1).abs()).max() <= 1 / 64 + 1e-6
    for share in (0.5, 0.9, 0.99):
        found, exact = torch.quantile(middle, share), torch.quantile(values, share)
        assert found == pytest.approx(exact.item(), rel=1 / 64 + 1e-3)


def test_a_sample_is_the_smallest_hashes_of_each_group():
    pairs = firings(3)
    found = searched([pairs]).found().sample
    groups = WANTED.bins.of(pairs.values) // WANTED.group + pairs.features * WANTED.n_groups
    hashes = hashing.hash64(7, pairs.features.numpy(), pairs.positions.numpy())
    for group in range(7 * WANTED.n_groups):
        inside = (groups == group).numpy()
        expected = pairs.positions.numpy()[inside][np.argsort(hashes[inside])][:3].tolist()
        assert found.positions[group].tolist() == expected + [-1] * (3 - len(expected))


def test_a_hash_is_the_same_in_numpy_and_in_torch():
    features, positions = torch.arange(1000) % 17, torch.arange(1000) ** 3
    priorities = hashing.priorities(hashing.feature_hash_bits(5, 17, torch.device("cpu"))[features], positions)
    expected = hashing.hash64(5, features.numpy(), positions.numpy()) >> np.uint64(2)
    assert (-priorities).tolist() == expected.tolist()


def test_samples_are_uniform():
    n = 20_000
    wanted = SearchSettings(n_top=1, n_sampled=1000, group=16)
    everywhere = Firings(torch.zeros(n, dtype=torch.int64), torch.arange(n), torch.ones(n))
    drawn = searched([everywhere], wanted, 1).found().sample
    chosen = drawn.positions[drawn.positions >= 0]
    assert len(chosen.unique()) == 1000
    # the mean of 1,000 uniform draws lies within five standard errors
    assert chosen.double().mean().item() == pytest.approx(n / 2, abs=5 * n / np.sqrt(12 * 1000))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 0.0])
def test_what_is_no_activation_is_refused(bad):
    pairs = firings(0)
    pairs.values[5] = bad
    with pytest.raises(ValueError, match="positive, finite"):
        searched([pairs])


def test_an_empty_chunk_changes_nothing():
    nothing = Firings(*(column[:0] for column in firings(0)))
    assert_same(searched([firings(0), nothing]).found(), searched([firings(0)]).found())
    assert (searched([nothing]).found().top.positions == -1).all()


def test_wrong_arguments_are_refused():
    features, positions, values = firings(0)
    threshold = torch.zeros(7)
    with pytest.raises(TypeError, match="features must be int64"):
        search.scan_top(features.int(), positions, values, threshold)
    with pytest.raises(TypeError, match="values must be float32"):
        search.merge_top(empty_top(7, 2), features, positions, values.double())
    with pytest.raises(ValueError, match="one value for each"):
        search.scan_top(features, positions[1:], values, threshold)
    with pytest.raises(ValueError, match="divides 8 bins"):
        search.hist_sample(features, positions, values, tally=empty_tally(7, WANTED.bins), bins=WANTED.bins, group=16)
    with pytest.raises(ValueError, match="power of two"):
        Bins(per_octave=12)
    with pytest.raises(ValueError, match="must lie within"):
        Bins(lowest=-127)
    other = FeatureSearch(7, SearchSettings(n_top=5))
    with pytest.raises(ValueError, match="search alike"):
        searched([]).combine(other)
    with pytest.raises(ValueError, match="of another search"):
        searched([]).restore(FeatureSearch(6, WANTED).tensors())
