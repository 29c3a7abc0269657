"""The search's Triton kernels against the reference: integers, positions and values are equal to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saelab_kernels import search
from saelab_kernels.search import reference
from saelab_kernels.search.hashing import feature_hash_bits
from saelab_kernels.search.stream import FeatureSearch, SearchSettings
from saelab_kernels.search.types import Bins, Firings, TopState, empty_tally, empty_top

pytestmark = pytest.mark.fused
SHAPES = [(1, 1, 1), (7, 33, 5), (129, 40, 33), (33, 1000, 7)]
BINS = Bins(per_octave=8, lowest=-2, n_octaves=4)


def firings(n_features: int, n_positions: int, device: str, *, share: float = 0.05) -> Firings:
    """Pairs by position with many equal values; feature 0 fires everywhere, the last never unless it is the first."""
    rng = np.random.default_rng(n_features)
    fires = rng.random((n_positions, n_features)) < share
    fires[:, -1], fires[:, 0] = False, True
    positions, features = np.nonzero(fires)
    values = rng.integers(1, 20, len(features)).astype(np.float32) / 4
    columns = features, positions, values
    return Firings(*(torch.from_numpy(column).to(device) for column in columns))


def assert_equal(left: tuple, right: tuple) -> None:
    for mine, theirs in zip(left, right, strict=True):
        assert torch.equal(mine, theirs)


def check_merge(pairs: Firings, empty: TopState) -> None:
    """Half of the pairs at random, then the other, fused and by the reference, twice over."""
    order = torch.randperm(len(pairs.features), device=pairs.features.device)
    halves = [Firings(*(column[chosen] for column in pairs)) for chosen in order.chunk(2)]
    expected, found, again = empty.clone(), empty.clone(), empty.clone()
    for half in halves:
        reference.merge_top_(expected, *half)
        search.merge_top_(found, *half)
        search.merge_top_(again, *half)
    assert_equal(found, expected)
    assert_equal(again, found)


@pytest.mark.parametrize(("n_features", "n_positions", "m"), SHAPES)
def test_scan_top_is_the_reference_in_order(n_features, n_positions, m, device):
    pairs = firings(n_features, n_positions, device)
    threshold = torch.randint(0, 20, (n_features,), device=device) / 4
    assert_equal(search.scan_top(*pairs, threshold), reference.scan_top(*pairs, threshold))
    whole = pairs._replace(values=(pairs.values * 4).long())
    assert_equal(search.scan_top(*whole, (threshold * 4).long()), reference.scan_top(*whole, (threshold * 4).long()))


@pytest.mark.parametrize(("n_features", "n_positions", "m"), SHAPES)
def test_merge_top_is_the_reference(n_features, n_positions, m, device):
    check_merge(firings(n_features, n_positions, device), empty_top(n_features, m, device=device))


def test_merge_top_takes_priorities_as_well_as_activations(device):
    pairs = firings(7, 60, device)
    priorities = pairs._replace(values=-torch.randint(0, 2**62, pairs.values.shape, device=device))
    check_merge(priorities, empty_top(7, 5, dtype=torch.int64, device=device))


@pytest.mark.parametrize("m", [17, 64, 128, 129])
def test_many_places_are_merged_too(m, device):
    check_merge(firings(3, 200, device, share=0.5), empty_top(3, m, device=device))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("n_features", "n_positions", "m"), SHAPES)
def test_hist_sample_is_the_reference(n_features, n_positions, m, sampled, device):
    pairs = firings(n_features, n_positions, device)
    pairs.values[: len(pairs.values) // 3] *= 1e-30  # below all bins, and other exponents for the sums
    hashes = feature_hash_bits(m, n_features, torch.device(device)) if sampled else None
    found = []
    for hist_sample in (search.hist_sample, reference.hist_sample):
        tally = empty_tally(n_features, BINS, device=device)
        arguments = {"tally": tally, "bins": BINS, "feature_hash": hashes, "group": 4}
        found.append((*tally, *(hist_sample(*pairs, **arguments) or ())))
    assert_equal(*found)


def test_no_pairs_are_no_error(device):
    nothing = Firings(*(column[:0] for column in firings(7, 33, device)))
    state = empty_top(7, 3, device=device)
    assert len(search.scan_top(*nothing, state.threshold).features) == 0
    assert (search.merge_top_(state, *nothing).positions == -1).all()


@pytest.mark.parametrize(("n_features", "n_positions"), [(33, 100), pytest.param(16_384, 4_096, marks=pytest.mark.gpu)])
def test_a_whole_search_finds_what_the_tuned_path_finds(n_features, n_positions, device, monkeypatch):
    pairs = firings(n_features, n_positions, device)
    wanted = SearchSettings(n_top=6, row_length=10, bins=BINS, group=4, n_sampled=2)
    found = []
    for path, on in (("fused", device), ("cpu", "cpu")):
        monkeypatch.setenv("SAELAB_KERNELS", path)
        searching = FeatureSearch(n_features, wanted, device=on)
        for low in range(0, n_positions, 40):
            inside = (pairs.positions >= low) & (pairs.positions < low + 40)
            searching.add(*(column[inside].to(on) for column in pairs))
        found.append(searching.tensors())
    assert found[0].keys() == found[1].keys()
    assert_equal(tuple(found[0].values()), tuple(found[1].values()))
