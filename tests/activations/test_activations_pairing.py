"""A second model on the very tokens of a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from activations_fake_model import FakeModel, FakeTokenizer

from saelab import atomic, rundir
from saelab import config as configs
from saelab.activations import pairing
from saelab.activations.capture import CacheConfig, capture
from saelab.activations.pairing import settings_of_pair
from saelab.activations.stacked import Slot, StackedBatches, check_pair
from saelab.activations.store import ActivationStore
from saelab.activations.text import TextConfig
from saelab.errors import ArtifactError, ConfigError

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def first_tokenizer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Sets the tokenizer of the first store's model."""

    def put(tokenizer: Any) -> None:
        monkeypatch.setattr(pairing, "tokenizer_of", lambda name, store: tokenizer)

    put(FakeTokenizer())
    return put


@pytest.fixture
def first(tmp_path: Path) -> ActivationStore:
    lines = [{"text": f"Document {i} says {'that ' * (i % 7 + 3)}.", "title": f"T{i}"} for i in range(40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = CacheConfig(
        model="first",
        hook_names=(HOOK, "blocks.0.hook_resid_post"),
        text=TextConfig(source=str(tmp_path / "text.jsonl")),
        tokens=1500,
        context=16,
        held_out=0.25,
        rows_per_shard=12,
    )
    store = capture(config, tmp_path / "first", model=FakeModel())
    (tmp_path / "text.jsonl").unlink()  # nobody needs it again
    return store


def like(store: ActivationStore, **changes: object) -> CacheConfig:
    return configs.from_mapping(CacheConfig, settings_of_pair(store) | {"model": "second"} | changes)


def test_the_second_model_reads_the_very_rows_of_the_first(first: ActivationStore, tmp_path: Path):
    model = FakeModel(seed=1)
    second = capture(like(first), tmp_path / "second", model=model, like=first)
    rows = first.rows("all")
    torch.testing.assert_close(second.tokens(rows), first.tokens(rows), rtol=0, atol=0)
    torch.testing.assert_close(second.docs(rows), first.docs(rows), rtol=0, atol=0)
    assert second.rows("held_out").tolist() == first.rows("held_out").tolist()
    assert len(second.rows("held_out")) > 0
    assert (second.path / "documents.jsonl").read_bytes() == (first.path / "documents.jsonl").read_bytes()
    expected = model.capture(first.tokens(rows), [HOOK])[HOOK]
    torch.testing.assert_close(second.acts(HOOK, rows), expected.bfloat16(), rtol=0, atol=0)
    check_pair(first, second)
    assert StackedBatches([Slot(first, HOOK), Slot(second, HOOK)], batch_size=8, seed=0).at(0).shape == (8, 2, 8)


def test_the_pairing_is_recorded(first: ActivationStore, tmp_path: Path):
    second = capture(like(first), tmp_path / "second", model=FakeModel(seed=1), like=first)
    assert first.manifest.like is None
    assert second.manifest.like is not None
    assert second.manifest.like.model == first.manifest.model
    assert second.manifest.like.sha256 == rundir.fingerprint(first.path)
    assert rundir.parent(second.path, "like") == first.path.resolve()
    (first.path / "manifest.json").write_text((first.path / "manifest.json").read_text().replace("first", "other"))
    with pytest.raises(ArtifactError, match=r"like at .* has changed since"):
        rundir.check_parents(second.path)


def test_hooks_and_dtype_may_differ_from_the_first(first: ActivationStore, tmp_path: Path):
    config = like(first, hook_names=[HOOK], dtype="int8", batch_rows=3)
    second = capture(config, tmp_path / "second", model=FakeModel(seed=1), like=first)
    assert second.hook_names == (HOOK,)
    check_pair(first, second)


@pytest.mark.parametrize(
    "changes", [{"tokens": 1600}, {"context": 15}, {"held_out": 0.1}, {"rows_per_shard": 10}, {"text": {"source": "x"}}]
)
def test_what_the_first_decides_cannot_be_asked_for(first: ActivationStore, tmp_path: Path, changes: dict):
    (name,) = changes
    with pytest.raises(ConfigError, match=rf"has its {name} .*; leave {name} out"):
        capture(like(first, **changes), tmp_path / "second", model=FakeModel(seed=1), like=first)
    assert not (tmp_path / "second").exists()


def test_another_tokenizer_is_refused_before_anything_is_written(
    first: ActivationStore, tmp_path: Path, first_tokenizer: Callable[[Any], None]
):
    model = FakeModel(seed=1)
    model.tokenizer = FakeTokenizer(other={ord("t"): "<T>"})
    with pytest.raises(ArtifactError, match=r"token 116 is '<116>' to first, whose tokens .*, but '<T>' to the model"):
        capture(like(first), tmp_path / "second", model=model, like=first)
    model.tokenizer = FakeTokenizer(n=256)  # lacks BOS
    with pytest.raises(ArtifactError, match=r"token 256 is '<256>' to first, .* but None to the model given"):
        capture(like(first), tmp_path / "second", model=model, like=first)
    assert not (tmp_path / "second").exists()
    # what a token means that does not occur does not matter
    model.tokenizer = FakeTokenizer(n=300, other={ord("!"): "?"})
    capture(like(first), tmp_path / "second", model=model, like=first)


def test_a_first_model_that_is_gone_is_one_sentence(
    first: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.undo()
    moved = ActivationStore(first.path, replace(first.manifest, model=replace(first.manifest.model, name="/gone")))
    with pytest.raises(ArtifactError, match=r"tokens of /gone, whose tokenizer cannot be loaded") as caught:
        capture(like(moved), tmp_path / "second", model=FakeModel(seed=1), like=moved)
    assert "\n" not in str(caught.value)


def test_an_interrupted_second_capture_goes_on_from_its_record(first: ActivationStore, tmp_path: Path):
    whole = capture(like(first), tmp_path / "whole", model=FakeModel(seed=1), like=first)
    out = tmp_path / "second"

    def stop(done: int, of: int) -> None:
        if done > 20 * 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(like(first), out, model=FakeModel(seed=1), like=first, progress=stop)
    model = FakeModel(seed=1)
    capture(like(first), out, model=model, resume=True)  # which store it is like stands in parents.json
    assert model.n_forwards == len(whole.manifest.shards) - 1
    for file in [entry.file for entry in whole.manifest.shards] + ["manifest.json", "documents.jsonl"]:
        assert atomic.sha256(out / file) == atomic.sha256(whole.path / file)


def test_a_bos_that_is_not_the_models_own_is_kept_and_told(
    first: ActivationStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    model = FakeModel(seed=1)
    model.bos_id = 255
    second = capture(like(first), tmp_path / "second", model=model, like=first)
    assert (second.tokens(np.arange(3))[:, 0] == 256).all()
    assert second.manifest.bos_id == 256
    assert "rows begin with token 256" in caplog.text


def test_a_store_without_a_pairing_still_opens(first: ActivationStore):
    file = first.path / "manifest.json"
    plain = json.loads(file.read_text())
    del plain["like"]  # as stores were written before there were pairs
    file.write_text(json.dumps(plain))
    assert ActivationStore.open(first.path).manifest.like is None
