from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.errors import ArtifactError
from saelab.features import codes, planted


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> planted.Planted:
    return planted.plant(tmp_path_factory.mktemp("planted") / "planted.json", n_features=8, n_rows=40)


def encoded(text, folder, rows, **options) -> codes.Codes:
    return codes.encode(text.sae, text.store, rows, folder, hook_name=planted.HOOK_NAME, **options)


@settings(deadline=None, max_examples=15)
@given(data=st.data(), chunk_rows=st.integers(1, 50))
def test_codes_are_the_positive_activations_whatever_the_chunks(text, tmp_path_factory, data, chunk_rows):
    rows = np.array(data.draw(st.lists(st.integers(0, 39), min_size=1, max_size=12, unique=True).map(sorted)))
    found = encoded(text, tmp_path_factory.mktemp("codes"), rows, chunk_rows=chunk_rows)
    acts = text.store.planted_acts[rows].flatten(0, 1).numpy()
    np.testing.assert_array_equal(found.matrix().toarray(), acts)
    np.testing.assert_array_equal(found.n_fired, (acts > 0).sum(0))


def test_blocks_turned_over_hold_every_pair_once(text, tmp_path):
    found = encoded(text, tmp_path, np.arange(40))
    acts = text.store.planted_acts.flatten(0, 1).numpy()
    for max_pairs in (1, 300, 10**6):
        ranges = list(codes.blocks(found.n_fired, max_pairs=max_pairs))
        assert [low for low, _ in ranges] == [0, *(high for _, high in ranges[:-1])]
        assert ranges[-1][1] == 8
        for low, high in ranges:
            pairs = codes.by_feature(found, low, high)
            assert high == low + 1 or len(pairs.positions) <= max_pairs
            for f in range(pairs.n_features):
                segment = slice(pairs.offsets[f], pairs.offsets[f + 1])
                positions = pairs.positions[segment]
                assert positions.tolist() == np.flatnonzero(acts[:, low + f]).tolist()
                assert pairs.values[segment].tolist() == acts[positions, low + f].tolist()


def test_pairs_above_a_floor_keep_their_order(text, tmp_path):
    pairs = codes.by_feature(encoded(text, tmp_path, np.arange(40)), 0, 8)
    floors = np.full(8, 2, np.float32)
    above = pairs.above(floors)
    assert above.n_fired.tolist() == [(pairs.values[pairs.features == f] >= 2).sum() for f in range(8)]
    assert above.positions.tolist() == pairs.positions[pairs.values >= 2].tolist()


def test_text_without_an_active_feature_has_no_codes(text, tmp_path):
    silent = text.store.planted_acts * 0
    found = encoded(
        text._replace(
            store=planted.PlantedStore(text.store.path, text.store.planted_tokens, text.store.planted_docs, silent)
        ),
        tmp_path,
        np.arange(40),
    )
    assert found.n_fired.sum() == 0
    assert found.matrix().nnz == 0
    assert codes.by_feature(found, 0, 8).positions.size == 0


def test_progress_counts_rows(text, tmp_path):
    seen = []
    encoded(text, tmp_path, np.arange(40), chunk_rows=16, progress=lambda *args: seen.append(args[:2]))
    assert seen == [(16, 40), (32, 40), (40, 40)]


def test_a_disk_that_fills_up_while_encoding_is_one_sentence_and_leaves_nothing(text, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match="no space left"):
        encoded(text, tmp_path, np.arange(40), progress=full)
    assert not list(tmp_path.iterdir())
