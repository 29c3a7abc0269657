from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from activations_fake_model import HOOKS, FakeModel

from saelab.activations.capture import CacheConfig, capture
from saelab.activations.store import ActivationStore, read_manifest
from saelab.activations.text import TextConfig
from saelab.errors import ArtifactError, ConfigError, ShapeError

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    lines = [{"text": f"Document {i} says {'that ' * (i % 7 + 3)}."} for i in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = CacheConfig(
        model="fake",
        hook_names=tuple(HOOKS),
        text=TextConfig(source=str(folder / "text.jsonl")),
        context=16,
        held_out=0.3,
        rows_per_shard=12,
    )
    capture(config, folder / "activations", model=FakeModel())
    return folder / "activations"


@pytest.fixture
def path(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(finished, tmp_path / "activations")
    return tmp_path / "activations"


# --- reading


def test_a_workspace_is_as_good_as_the_directory_itself(finished: Path):
    assert ActivationStore.open(finished.parent).path == finished
    assert ActivationStore.open(str(finished)).manifest == ActivationStore.open(finished, verify="full").manifest


def test_the_splits_share_no_row_and_no_document_and_cover_all(finished: Path):
    store = ActivationStore.open(finished)
    train, held_out = store.rows("train"), store.rows("held_out")
    assert sorted([*train, *held_out]) == store.rows("all").tolist() == list(range(store.n_rows))
    assert len(held_out) == store.manifest.n_held_out_rows > 0
    assert not set(store.docs(train).unique().tolist()) & set(store.docs(held_out).unique().tolist())


def test_rows_come_back_in_the_order_asked_for_across_shards(finished: Path):
    store = ActivationStore.open(finished)
    rows = np.random.default_rng(0).permutation(store.n_rows)
    rows = np.concatenate([rows, rows[:5]])
    everything = torch.cat([store.acts(HOOK, np.array([row])) for row in range(store.n_rows)])
    torch.testing.assert_close(store.acts(HOOK, rows), everything[rows], rtol=0, atol=0)
    assert store.acts(HOOK, rows).dtype == torch.bfloat16
    assert store.tokens(rows).dtype == store.docs(rows).dtype == torch.int64
    assert store.tokens(rows).shape == store.docs(rows).shape == (len(rows), store.context)


@pytest.mark.parametrize("hook_name", list(HOOKS))
def test_gathering_positions_equals_picking_from_rows(finished: Path, hook_name: str):
    store = ActivationStore.open(finished)
    positions = np.random.default_rng(0).integers(0, store.n_rows * store.context, 500)
    everything = store.acts(hook_name, store.rows("all")).flatten(0, 1)
    torch.testing.assert_close(store.gather(hook_name, positions), everything[positions], rtol=0, atol=0)


def test_nothing_asked_for_is_nothing(finished: Path):
    store = ActivationStore.open(finished)
    none = np.empty(0, np.int64)
    assert store.acts(HOOK, none).shape == (0, 16, 8)
    assert store.tokens(none).shape == (0, 16)
    assert store.gather(HOOK, none).shape == (0, 8)


@pytest.mark.parametrize("row", [-1, 10**6])
def test_a_row_beyond_the_store_is_refused(finished: Path, row: int):
    with pytest.raises(ShapeError, match=f"row {row} was asked for"):
        ActivationStore.open(finished).tokens(np.array([0, row]))


def test_an_unknown_hook_names_the_nearest_one(finished: Path):
    with pytest.raises(ConfigError, match=r"no activations of blocks.0.hook_resid_pst; did you mean blocks.0"):
        ActivationStore.open(finished).d_in("blocks.0.hook_resid_pst")


def test_another_spelling_of_a_hook_is_understood(finished: Path):
    store = ActivationStore.open(finished)
    assert store.d_in("blocks.0.hook_out") == store.d_in("blocks.0.resid_post") == 8


def test_changing_what_was_read_does_not_change_the_file(path: Path):
    store = ActivationStore.open(path)
    for rows in (np.array([0]), store.rows("all")):
        store.acts(HOOK, rows).zero_()
    store._shard(0)[f"acts.{HOOK}"].zero_()
    ActivationStore.open(path).verify()


# --- damage


def test_any_flipped_bit_is_found_by_verifying_and_the_file_named(path: Path):
    rng = random.Random(0)
    files = [*sorted(path.glob("shard_*")), path / "documents.jsonl"]
    for _ in range(60):
        file = rng.choice(files)
        whole = file.read_bytes()
        spoiled = bytearray(whole)
        spoiled[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(spoiled)
        with pytest.raises(ArtifactError, match=file.name):
            ActivationStore.open(path, verify="full")
        file.write_bytes(whole)
    ActivationStore.open(path, verify="full")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_found_by_opening(path: Path, keep: int):
    file = path / "shard_00001.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"shard_00001.safetensors has .* it was cut or changed; capture again"):
        ActivationStore.open(path)


def test_a_missing_shard_is_found_by_opening(path: Path):
    (path / "shard_00001.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"shard_00001.safetensors is missing"):
        ActivationStore.open(path)


def test_a_shard_of_the_right_size_with_a_spoiled_header_is_found_by_opening(path: Path):
    file = path / "shard_00000.safetensors"
    whole = file.read_bytes()
    headers = [
        whole.replace(b"BF16", b"F16 ", 1),
        whole.replace(b"tokens", b"tokenz", 1),
        whole.replace(b'"doc"', b'"dof"', 1),
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"[" * (len(whole) - 8),
        bytes(len(whole)),
    ]
    for spoiled in headers:
        assert spoiled != whole
        assert len(spoiled) == len(whole)
        file.write_bytes(spoiled)
        with pytest.raises(ArtifactError, match=r"shard_00000.safetensors is damaged"):
            ActivationStore.open(path)


def test_two_swapped_shards_are_found_by_verifying(path: Path):
    one, two = path / "shard_00000.safetensors", path / "shard_00001.safetensors"
    one.rename(path / "aside")
    two.rename(one)
    (path / "aside").rename(two)
    with pytest.raises(ArtifactError, match=r"shard_00000.safetensors is damaged"):
        ActivationStore.open(path, verify="full")


def test_an_unfinished_store_says_how_to_go_on(path: Path):
    (path / "DONE").unlink()
    with pytest.raises(ArtifactError, match="unfinished; continue it with: saelab cache --resume"):
        ActivationStore.open(path)


def spoiled_manifests(whole: dict) -> list[str]:
    def having(**changes: object) -> str:
        return json.dumps(whole | changes)

    shards = whole["shards"]
    return [
        "",
        "[]",
        "[" * 100_000,
        json.dumps(whole)[:-20],
        having(schema=2),
        having(surprise=1),
        having(context="16"),
        having(n_rows=whole["n_rows"] + 1),
        having(shards=[]),
        having(shards=shards[:-1]),
        having(shards=shards[::-1]),
        having(shards=[shards[0] | {"file": "../../secret.safetensors"}, *shards[1:]]),
        having(shards=[shards[0] | {"file": "/etc/passwd"}, *shards[1:]]),
        having(documents=whole["documents"] | {"file": "../documents.jsonl"}),
        having(d_model={HOOK: 8}),
        having(dtype="float8"),
        having(rows_per_shard=5),
        json.dumps({key: value for key, value in whole.items() if key != "bos_id"}),
    ]


@pytest.mark.parametrize("number", range(18))
def test_a_spoiled_manifest_is_refused_in_one_sentence(path: Path, number: int):
    manifests = spoiled_manifests(json.loads((path / "manifest.json").read_text()))
    assert len(manifests) == 18
    (path / "manifest.json").write_text(manifests[number])
    with pytest.raises(ArtifactError, match=r"manifest.json (is damaged|has schema 2)") as error:
        read_manifest(path / "manifest.json")
    assert "\n" not in str(error.value)


def test_a_missing_manifest_is_one_sentence(path: Path):
    (path / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"manifest.json is missing"):
        ActivationStore.open(path)
