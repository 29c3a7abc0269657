from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import saelab
from saelab.errors import ArtifactError, ConfigError, ShapeError
from saelab.features import build, planted
from saelab.features import index as index_module
from saelab.features.config import IndexConfig
from saelab.features.index import FeatureIndex, load_index
from saelab_kernels.search.hashing import hash64


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    path = tmp_path_factory.mktemp("workspace")
    planted.plant_index(path)
    return path


@pytest.fixture
def copy(workspace, tmp_path):
    """An index of one's own, to damage."""
    import shutil

    shutil.copytree(workspace, tmp_path / "copy")
    return tmp_path / "copy" / "index"


def content(path) -> dict[str, str]:
    """Checksums of what an index says; env.json tells of the time it was made, parents.json of the place."""
    files = [file for file in path.iterdir() if file.name not in ("env.json", "parents.json")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunk_rows=st.integers(1, 50), block_pairs=st.integers(1, 20_000))
def test_an_index_is_the_same_for_any_chunks_and_blocks(workspace, tmp_path_factory, chunk_rows, block_pairs):
    path = tmp_path_factory.mktemp("chunks")
    text = planted.plant(path / "planted.json")
    build.build(
        text.sae,
        text.store,
        text.model,
        path / "index",
        settings=IndexConfig(),
        sae_path=None,
        chunk_rows=chunk_rows,
        block_pairs=block_pairs,
    )
    assert content(path / "index") == content(workspace / "index")


def test_a_record_says_what_the_activations_say(workspace, tmp_path):
    text = planted.plant(tmp_path / "planted.json")
    index = load_index(workspace)
    acts, tokens = text.store.planted_acts, text.store.planted_tokens
    assert len(index) == index.n_features == 32
    assert index.n_tokens == tokens.size - len(tokens)
    for i in range(len(index)):
        record = index.feature(i)
        fired = acts[..., i][acts[..., i] > 0]
        assert record.n_fired == len(fired)
        assert record.density == pytest.approx(len(fired) / index.n_tokens)
        assert record.alive == (len(fired) > 0)
        assert sum(record.histogram.counts) == len(fired)
        assert record.histogram.edges[-1] == pytest.approx(record.max_act)
        assert sum(record.tokens[j].n_fired for j in range(len(record.tokens))) <= record.n_fired
        peaks = [(example.row, example.position) for example in record.top_examples]
        assert len({row for row, _ in peaks}) == len(peaks)
        for example in (*record.top_examples, *(e for interval in record.interval_examples for e in interval)):
            assert example.act == acts[example.row, example.position, i]
            assert example.token_ids[example.peak] == tokens[example.row, example.position]
            assert example.token == text.model.vocabulary[example.token_ids[example.peak]]
            assert example.title == f"Document {example.doc}"
            assert example.doc == text.store.planted_docs[example.row, example.position]
            assert len(example.tokens) == len(example.acts) == 32
            first = example.position - example.peak
            np.testing.assert_array_equal(example.acts, acts[example.row, first : first + 32, i])
        if fired.numel():
            assert record.max_act == record.top_examples[0].act == fired.max()
            edges = record.interval_edges
            assert edges[0] == 0
            assert edges[-1] == record.max_act
            for low, high, interval in zip(edges[:-1], edges[1:], record.interval_examples, strict=True):
                assert all(low <= example.act <= high for example in interval)


def test_promoted_tokens_and_neighbours_are_in_the_record(workspace, tmp_path):
    text = planted.plant(tmp_path / "planted.json")
    record = load_index(workspace).feature(9)
    effects = text.sae.W_dec[9] @ text.model.unembed
    effects = effects - effects.mean()
    assert record.promoted[0].token_id == effects.argmax()
    assert record.promoted[0].effect == pytest.approx(float(effects.max()), rel=1e-4)
    assert record.suppressed[0].token_id == effects.argmin()
    cosine = torch.nn.functional.cosine_similarity(text.sae.W_dec, text.sae.W_dec[9:10])
    cosine[9] = -2
    assert record.neighbours_cosine[0].feature == cosine.argmax()
    assert load_index(workspace).nearest(9, n=3) == record.neighbours_cosine[:3]
    # feature 4 fires on 30 % of all tokens: the only one that others meet often enough
    assert record.neighbours_coactivation[0].feature == 4


def test_a_limit_on_tokens_spreads_the_rows_over_the_text(tmp_path):
    index = planted.plant_index(tmp_path, config=IndexConfig(max_tokens=64 * 40))
    assert index.manifest.n_rows == 40
    assert index.n_tokens == 40 * 63
    rows = {e.row for i in range(8) for e in index.feature(i).top_examples}
    assert max(rows) == 159
    assert min(rows) < 20


def test_interval_examples_are_chosen_by_their_place_in_the_store(tmp_path):
    text = planted.plant(tmp_path / "planted.json")
    index = planted.plant_index(tmp_path, config=IndexConfig(max_tokens=64 * 40))
    rows = np.linspace(0, 159, 40).round().astype(int)
    acts = text.store.planted_acts[rows, :, 4].numpy()
    row, column = np.nonzero(acts)
    keys = hash64(0, np.full(len(row), 4), rows[row] * 64 + column)
    record = index.feature(4)
    intervals = np.searchsorted(record.interval_edges[1:-1], acts[row, column], side="right")
    for j, interval in enumerate(record.interval_examples):
        inside = np.flatnonzero(intervals == j)
        chosen = inside[np.argsort(keys[inside])[:5]]
        assert [(e.row, e.position) for e in interval] == [(rows[row[i]], column[i]) for i in chosen]


def test_settings_change_what_is_kept(tmp_path):
    wanted = IndexConfig(
        n_examples=3, window=9, after=2, n_intervals=2, per_interval=1,
        n_logits=4, n_neighbours=2, n_bins=7, n_tokens_kept=2,
    )  # fmt: skip
    record = planted.plant_index(tmp_path, config=wanted).feature(8)
    assert len(record.top_examples) == 3
    assert {len(e.tokens) for e in record.top_examples} == {9}
    assert [len(interval) for interval in record.interval_examples] == [1, 1]
    assert len(record.promoted) == len(record.suppressed) == 4
    assert len(record.neighbours_cosine) == 2
    assert len(record.histogram.counts) == 7
    assert len(record.tokens) <= 2


@pytest.mark.parametrize(
    "wrong", [{"n_examples": 0}, {"window": 4, "after": 4}, {"after": -1}, {"max_tokens": 0}, {"n_bins": 0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError):
        IndexConfig(**wrong)


def test_another_seed_draws_other_interval_examples(workspace, tmp_path):
    other = planted.plant_index(tmp_path, config=IndexConfig(seed=1)).feature(4)
    record = load_index(workspace).feature(4)
    assert other.top_examples == record.top_examples
    assert other.interval_examples != record.interval_examples


@pytest.mark.parametrize("name", [index_module.TABLE, *index_module.TENSORS, *index_module.TEXTS])
def test_a_missing_or_damaged_file_is_named(copy, name):
    file = copy / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=f"{name} has {len(whole) - 1} bytes"):
        FeatureIndex.open(copy)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(ArtifactError, match=f"{name} is damaged"):
        FeatureIndex.open(copy)
    file.unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        FeatureIndex.open(copy)


def test_large_files_are_hashed_only_when_asked(copy, monkeypatch):
    monkeypatch.setattr(index_module, "SMALL_BYTES", 10)
    file = copy / "examples.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    file.write_bytes(flipped)
    index = FeatureIndex.open(copy)
    with pytest.raises(ArtifactError, match=r"examples\.safetensors is damaged"):
        index.verify()
    with pytest.raises(ArtifactError, match=r"examples\.safetensors is damaged"):
        FeatureIndex.open(copy, verify="full")


@pytest.mark.parametrize("content", ["{", '{"schema": 1}', '{"unknown": 2}', "[1]", "3"])
def test_a_damaged_manifest_is_named(copy, content):
    (copy / "index.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"index\.json is damaged"):
        FeatureIndex.open(copy)


def test_an_index_of_another_schema_is_refused(copy):
    manifest = json.loads((copy / "index.json").read_text())
    (copy / "index.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(ArtifactError, match="schema 99"):
        FeatureIndex.open(copy)


def test_an_interrupted_index_is_not_opened(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(build.logits, "logit_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planted.plant_index(tmp_path)
    with pytest.raises(ArtifactError, match="unfinished"):
        load_index(tmp_path / "index")


@settings(deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stop=st.integers(0, 14), chunk_rows=st.integers(10, 60), checkpoint_chunks=st.integers(1, 3))
def test_an_index_that_is_interrupted_and_resumed_has_the_same_bytes(
    workspace, tmp_path_factory, stop, chunk_rows, checkpoint_chunks
):
    path = tmp_path_factory.mktemp("resumed")
    text = planted.plant(path / "planted.json")
    calls = []

    def progress(done, total, what):
        calls.append(done)
        if len(calls) == stop:
            raise KeyboardInterrupt

    for _ in range(2):
        try:
            build.build(
                text.sae,
                text.store,
                text.model,
                path / "index",
                settings=IndexConfig(),
                sae_path=None,
                resume=True,
                progress=progress,
                chunk_rows=chunk_rows,
                checkpoint_chunks=checkpoint_chunks,
                block_pairs=5_000,
            )
        except KeyboardInterrupt:
            continue
    assert content(path / "index") == content(workspace / "index")
    assert {file.name for file in (path / "index").iterdir()} == {p.name for p in (workspace / "index").iterdir()}


def test_an_index_is_not_resumed_with_other_settings(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    text = planted.plant(tmp_path / "planted.json")
    with monkeypatch.context() as patch:
        patch.setattr(build.logits, "logit_table", interrupted)
        with pytest.raises(KeyboardInterrupt):
            planted.plant_index(tmp_path)
    with pytest.raises(ArtifactError, match="other settings"):
        planted.build_index(
            text.sae, text.store, text.model, tmp_path / "index", config=IndexConfig(seed=1), resume=True
        )
    assert planted.build_index(text.sae, text.store, text.model, tmp_path / "index", resume=True).n_features == 32


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build, "save_file", full)
    with pytest.raises(ArtifactError, match="no space left"):
        planted.plant_index(tmp_path)


def test_an_index_is_not_written_over_another(workspace):
    with pytest.raises(ArtifactError, match="already holds a finished run"):
        planted.plant_index(workspace)


def test_an_sae_of_another_hook_or_width_is_refused(tmp_path):
    from dataclasses import replace

    text = planted.plant(tmp_path / "planted.json")
    elsewhere = replace(text.sae, metadata=planted.PlantedMetadata("blocks.7.hook_resid_post"))
    with pytest.raises(ArtifactError, match=r"blocks\.7"):
        planted.build_index(elsewhere, text.store, text.model, tmp_path / "a")
    wider = replace(text.sae, d_in=99)
    with pytest.raises(ShapeError, match="vectors of 99"):
        planted.build_index(wider, text.store, text.model, tmp_path / "b")


@pytest.mark.parametrize("wrong", [-1, 32, 10**9])
def test_a_feature_that_does_not_exist_is_refused(workspace, wrong):
    index = load_index(workspace)
    for look_up in (index.feature, index.label, index.nearest, index.trigger_tokens):
        with pytest.raises(ShapeError, match="0 to 31"):
            look_up(wrong)


def test_an_unknown_column_suggests_the_nearest(workspace):
    with pytest.raises(ConfigError, match="density"):
        load_index(workspace).column("densty")


def test_the_table_has_one_row_a_feature_and_agrees_with_the_records(workspace):
    index = load_index(workspace)
    assert index.table.num_rows == 32
    assert index.column("feature").tolist() == list(range(32))
    assert index.column("top_token")[0] in (" feet", " foot")
    assert index.column("top_token")[2] == " York"
    assert index.column("top_token")[5] == ""
    for i in (0, 1, 4, 5):
        record = index.feature(i)
        assert index.column("max")[i] == record.max_act
        assert index.column("label")[i] == record.label.text
        f1 = index.column("label_f1")[i]
        assert np.isnan(f1) if record.label.f1 is None else f1 == record.label.f1


def test_the_most_token_specific_features_have_token_rules_with_support(workspace):
    index = load_index(workspace)
    chosen = index.most_token_specific(5, min_support=60, max_density=1.0)
    assert len(chosen) == 5
    labels = [index.label(i) for i in chosen]
    assert all(label.kind == "token" and label.n_held_out >= 60 for label in labels)
    ranks = [(-label.precision, -label.f1) for label in labels]
    assert ranks == sorted(ranks)
    limit = float(np.median(index.column("density")[chosen]))
    rarer = index.most_token_specific(5, min_support=60, max_density=limit)
    assert (index.column("density")[rarer] <= limit).all()
    assert set(rarer) != set(chosen)
    assert index.trigger_tokens(0) == (planted.FEET, planted.FOOT)
    assert index.trigger_tokens(1) == ()


def test_density_ranges_include_their_ends(workspace):
    index = load_index(workspace)
    assert 5 in index.by_density(0.0, 0.0)
    assert index.by_density(0.25, 0.4).tolist() == [4]
    assert index.by_density().tolist() == list(range(32))


def test_reading_an_index_does_not_import_torch(workspace):
    script = (
        "import sys; from saelab.features.index import load_index; "
        f"index = load_index({str(workspace)!r}); index.feature(0); index.search('feet'); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=str(next(iter(saelab.__path__))) + "/..").returncode == 0
