from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.errors import ArtifactError
from saelab.features import codes

CONTEXT, N_ROWS, N_FEATURES = 6, 10, 8


def dense(seed: int = 0) -> np.ndarray:
    """Activations [rows, context, features], none at the first position of a row."""
    rng = np.random.default_rng(seed)
    shape = (N_ROWS, CONTEXT, N_FEATURES)
    acts = np.where(rng.random(shape) < 0.3, rng.integers(1, 5, shape), 0).astype(np.float32)
    acts[:, 0] = 0
    return acts


def written(folder, acts: np.ndarray, *, chunk_rows: int = 4) -> codes.Codes:
    files = codes.CodesFiles(folder, context=CONTEXT)
    files.cut(0)
    append(files, acts, chunk_rows=chunk_rows)
    return files.read((acts > 0).sum((0, 1)))


def append(files: codes.CodesFiles, acts: np.ndarray, *, chunk_rows: int = 4) -> None:
    for start in range(0, len(acts), chunk_rows):
        chunk = acts[start : start + chunk_rows]
        flat = chunk.reshape(-1, N_FEATURES)
        positions, features = np.nonzero(flat)
        files.append(positions, features, flat[positions, features], n_rows=len(chunk))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99), chunk_rows=st.integers(1, 12))
def test_what_is_appended_is_read_whatever_the_chunks(tmp_path_factory, seed, chunk_rows):
    acts = dense(seed)
    found = written(tmp_path_factory.mktemp("codes"), acts, chunk_rows=chunk_rows)
    np.testing.assert_array_equal(found.matrix().toarray(), acts.reshape(-1, N_FEATURES))


def test_blocks_turned_over_hold_every_pair_once(tmp_path):
    acts = dense()
    found, flat = written(tmp_path, acts), acts.reshape(-1, N_FEATURES)
    for max_pairs in (1, 30, 10**6):
        ranges = list(codes.blocks(found.n_fired, max_pairs=max_pairs))
        assert [low for low, _ in ranges] == [0, *(high for _, high in ranges[:-1])]
        assert ranges[-1][1] == N_FEATURES
        for low, high in ranges:
            pairs = codes.by_feature(found, low, high)
            assert high == low + 1 or len(pairs.positions) <= max_pairs
            for f in range(pairs.n_features):
                segment = slice(pairs.offsets[f], pairs.offsets[f + 1])
                positions = pairs.positions[segment]
                assert positions.tolist() == np.flatnonzero(flat[:, low + f]).tolist()
                assert pairs.values[segment].tolist() == flat[positions, low + f].tolist()


def test_pairs_above_a_floor_keep_their_order(tmp_path):
    pairs = codes.by_feature(written(tmp_path, dense()), 0, N_FEATURES)
    above = pairs.above(np.full(N_FEATURES, 2, np.float32))
    assert above.n_fired.tolist() == [(pairs.values[pairs.features == f] >= 2).sum() for f in range(N_FEATURES)]
    assert above.positions.tolist() == pairs.positions[pairs.values >= 2].tolist()


def test_text_without_an_active_feature_has_no_codes(tmp_path):
    found = written(tmp_path, dense() * 0)
    assert found.n_fired.sum() == found.matrix().nnz == 0
    assert codes.by_feature(found, 0, N_FEATURES).positions.size == 0


@pytest.mark.parametrize("n_kept", [0, 3, 8, 10])
def test_what_was_written_after_a_checkpoint_is_cut_and_written_again(tmp_path, n_kept):
    acts = dense()
    written(tmp_path, acts)
    for file in tmp_path.iterdir():  # a kill leaves parts of what came after
        with file.open("ab") as stream:
            stream.write(b"xyz")
    files = codes.CodesFiles(tmp_path, context=CONTEXT)
    files.cut(n_kept)
    append(files, acts[n_kept:])
    found = files.read((acts > 0).sum((0, 1)))
    np.testing.assert_array_equal(found.matrix().toarray(), acts.reshape(-1, N_FEATURES))


@pytest.mark.parametrize("name", ["features", "values", "counts"])
def test_a_file_shorter_than_its_checkpoint_says_is_damaged(tmp_path, name):
    written(tmp_path, dense())
    file = tmp_path / f"{name}.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"{name}\.bin is damaged"):
        codes.CodesFiles(tmp_path, context=CONTEXT).cut(N_ROWS)
