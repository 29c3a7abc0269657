from __future__ import annotations

import resource

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.errors import ArtifactError
from saelab.features import planted
from saelab.features.config import IndexConfig
from saelab.features.scan import BINS, FoundFeatures, Scanned, encoded, found_features, new_search, scan

SETTINGS = IndexConfig(n_examples=4, per_interval=2, seed=3)
ROWS = np.arange(40)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> planted.Planted:
    return planted.plant(tmp_path_factory.mktemp("planted") / "planted.json", n_features=8, n_rows=40)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> Scanned:
    return scanned(text, tmp_path_factory.mktemp("whole"))


def scanned(text, folder, rows=ROWS, **options) -> Scanned:
    return scan(text.sae, text.store, rows, folder, hook_name=planted.HOOK_NAME, settings=SETTINGS, **options)


def assert_same(left: FoundFeatures, right: FoundFeatures) -> None:
    for mine, theirs in zip(left[:-1], right[:-1], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    for mine, theirs in zip(left.sample, right.sample, strict=True):
        assert torch.equal(mine, theirs)


@settings(deadline=None, max_examples=15)
@given(data=st.data(), chunk_rows=st.integers(1, 50))
def test_codes_are_the_positive_activations_whatever_the_chunks(text, tmp_path_factory, data, chunk_rows):
    rows = np.array(data.draw(st.lists(st.integers(0, 39), min_size=1, max_size=12, unique=True).map(sorted)))
    found = scanned(text, tmp_path_factory.mktemp("codes"), rows, chunk_rows=chunk_rows).codes
    acts = text.store.planted_acts[rows].flatten(0, 1).numpy()
    np.testing.assert_array_equal(found.matrix().toarray(), acts)
    np.testing.assert_array_equal(found.n_fired, (acts > 0).sum(0))


def test_what_is_found_is_what_the_activations_say(text, whole):
    acts = text.store.planted_acts.numpy()
    for i in range(8):
        mine, found = acts[..., i], whole.found
        fired = mine[mine > 0]
        assert found.n_fired[i] == found.bin_counts[i].sum() == len(fired)
        assert found.max[i] == fired.max(initial=0)
        assert found.mean[i] == pytest.approx(fired.astype(np.float64).mean() if len(fired) else 0, rel=1e-12)
        peaks = sorted((-row.max(), r * 64 + int(row.argmax())) for r, row in enumerate(mine) if row.max() > 0)[:4]
        assert found.top_positions[i].tolist() == [p for _, p in peaks] + [-1] * (4 - len(peaks))


@settings(deadline=None, max_examples=8)
@given(chunk_rows=st.integers(1, 50))
def test_the_pass_finds_the_same_in_any_chunks(text, whole, tmp_path_factory, chunk_rows):
    assert_same(scanned(text, tmp_path_factory.mktemp("chunks"), chunk_rows=chunk_rows).found, whole.found)


@settings(deadline=None, max_examples=8)
@given(stops=st.lists(st.integers(1, 13), max_size=4), checkpoint_chunks=st.integers(1, 5))
def test_a_pass_that_is_interrupted_again_and_again_finds_the_same(
    text, whole, tmp_path_factory, stops, checkpoint_chunks
):
    folder = tmp_path_factory.mktemp("stops")
    for stop in [*stops, None]:
        calls = []

        def progress(done, total, what, calls=calls, stop=stop):
            calls.append(done)
            if len(calls) == stop:
                raise KeyboardInterrupt

        options = {"chunk_rows": 3, "checkpoint_chunks": checkpoint_chunks, "progress": progress}
        try:
            found = scanned(text, folder, **options)
        except KeyboardInterrupt:
            continue
    assert_same(found.found, whole.found)
    for name in ("offsets", "features", "values", "n_fired"):
        np.testing.assert_array_equal(getattr(found.codes, name), getattr(whole.codes, name))


def test_a_resumed_pass_repeats_only_what_came_after_its_checkpoint(text, tmp_path):
    def stop(done, total, what):
        if done == 24:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scanned(text, tmp_path, chunk_rows=4, checkpoint_chunks=2, progress=stop)
    seen = []
    scanned(text, tmp_path, chunk_rows=4, checkpoint_chunks=2, progress=lambda *args: seen.append(args[:2]))
    assert seen == [(28, 40), (32, 40), (36, 40), (40, 40)]


@settings(deadline=None, max_examples=10)
@given(shard=st.lists(st.booleans(), min_size=40, max_size=40))
def test_two_searches_over_disjoint_rows_combine_to_one(text, whole, shard):
    searches = []
    for rows in (ROWS[np.array(shard)], ROWS[~np.array(shard)]):
        search = new_search(8, text.store.context, SETTINGS)
        if len(rows):
            fired = encoded(text.sae, text.store, rows, hook_name=planted.HOOK_NAME)
            search.add(fired.features, fired.positions, fired.values)
        searches.append(search)
    searches[0].combine(searches[1])
    assert_same(found_features(searches[0]), whole.found)


def test_a_value_that_is_no_number_is_refused_and_its_row_named(text, tmp_path):
    acts = text.store.planted_acts.clone()
    acts[17, 5, 2] = float("inf")
    store = planted.PlantedStore(text.store.path, text.store.planted_tokens, text.store.planted_docs, acts)
    with pytest.raises(ArtifactError, match="no numbers on row 17"):
        scanned(text._replace(store=store), tmp_path)


@pytest.mark.parametrize("n_bytes", [100, 6_000])
def test_a_disk_that_fills_up_while_encoding_is_one_sentence_and_the_pass_can_go_on(text, whole, tmp_path, n_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))  # no file may grow beyond
    try:
        with pytest.raises(ArtifactError, match="no space left"):
            scanned(text, tmp_path, chunk_rows=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(scanned(text, tmp_path).found, whole.found)


def test_bins_hold_what_activations_are_like():
    assert BINS.of(torch.tensor([1e-5, 1.0, 1e6])).tolist() == [0, 14 * 8, BINS.n_bins - 1]
