from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from activations_fake_model import HOOKS, FakeModel

from saelab import atomic, rundir
from saelab import config as configs
from saelab.activations.capture import CacheConfig, capture
from saelab.activations.store import ActivationStore
from saelab.activations.text import TextConfig
from saelab.errors import ArtifactError, ConfigError, TextError

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Forty documents, of which a quarter is held out."""
    file = tmp_path / "text.jsonl"
    lines = [{"text": f"Document {i} says {'that ' * (i % 7 + 3)}.", "title": f"T{i}"} for i in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def config(text: Path) -> CacheConfig:
    return CacheConfig(
        model="fake",
        hook_names=(HOOK,),
        text=TextConfig(source=str(text)),
        tokens=10**6,
        context=16,
        held_out=0.25,
        rows_per_shard=12,
        batch_rows=5,
    )


def changed(config: CacheConfig, **changes: object) -> CacheConfig:
    return configs.from_mapping(CacheConfig, configs.to_mapping(config) | changes)


def artefact(path: Path) -> dict[str, bytes]:
    """The files whose bytes must not depend on how the capture went."""
    names = ["manifest.json", "documents.jsonl", "DONE", "run.json", "parents.json"]
    names += [file.name for file in path.glob("shard_*")]
    return {name: (path / name).read_bytes() for name in names}


def test_the_store_holds_what_the_model_computes(config: CacheConfig, tmp_path: Path):
    model = FakeModel()
    config = changed(config, hook_names=list(HOOKS), dtype="float32")
    store = capture(config, tmp_path / "out", model=model)
    rows = store.rows("all")
    assert len(rows) > 3 * config.rows_per_shard
    expected = model.capture(store.tokens(rows), list(HOOKS))
    for hook in HOOKS:
        torch.testing.assert_close(store.acts(hook, rows), expected[hook], rtol=0, atol=0)
        assert store.d_in(hook) == HOOKS[hook]


def test_each_row_begins_with_bos_and_its_documents_can_be_looked_up(config: CacheConfig, tmp_path: Path):
    store = capture(config, tmp_path / "out", model=FakeModel())
    rows = store.rows("all")
    tokens, docs = store.tokens(rows), store.docs(rows)
    assert (tokens[:, 0] == FakeModel.bos_id).all()
    text = bytes(tokens[0, 1:].tolist()).decode()
    assert text.startswith("Document ")
    number = text.split()[1]
    assert store.documents[int(docs[0, 0])].title == f"T{number}"
    assert [record.doc for record in store.documents] == list(range(len(store.documents)))
    for row in rows:
        sides = {store.documents[int(doc)].held_out for doc in docs[row]}
        assert sides == {bool(row in store.rows("held_out"))}


def test_a_store_is_as_long_as_the_budget_or_the_text(
    config: CacheConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    store = capture(changed(config, tokens=1000), tmp_path / "small", model=FakeModel())
    assert (store.n_rows, store.manifest.n_tokens) == (1000 // 16, 1000 // 16 * 16)
    assert not caplog.records
    store = capture(config, tmp_path / "all", model=FakeModel())
    assert store.manifest.n_tokens < 10**6
    assert "fewer than the 1,000,000 wanted" in caplog.text


def test_progress_counts_every_token_once_and_up(config: CacheConfig, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    store = capture(config, tmp_path / "out", model=FakeModel(), progress=lambda done, of: seen.append((done, of)))
    assert seen == sorted(seen)
    assert seen[-1] == (store.manifest.n_tokens, config.tokens)
    assert seen[0][0] == config.batch_rows * config.context


def test_forward_batches_are_aligned_to_shards(config: CacheConfig, tmp_path: Path):
    model = FakeModel()
    store = capture(config, tmp_path / "out", model=model)
    per_shard = [-(-shard.rows // config.batch_rows) for shard in store.manifest.shards]
    assert model.n_forwards == sum(per_shard)


def test_two_captures_are_the_same_bytes(config: CacheConfig, tmp_path: Path):
    for name in ("one", "two"):
        capture(config, tmp_path / name, model=FakeModel())
    assert artefact(tmp_path / "one") == artefact(tmp_path / "two")


def test_a_finished_capture_is_opened_without_work(config: CacheConfig, tmp_path: Path):
    capture(config, tmp_path / "out", model=FakeModel())
    model = FakeModel()
    capture(config, tmp_path / "out", model=model, resume=True)
    assert model.n_forwards == 0


def test_a_taken_directory_is_refused_before_the_model_is_needed(config: CacheConfig, tmp_path: Path):
    capture(config, tmp_path / "out", model=FakeModel())
    with pytest.raises(ArtifactError, match="already holds a finished run"):
        capture(config, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        capture(config, tmp_path / "file")


def test_the_stage_records_settings_from_which_it_can_be_repeated(config: CacheConfig, tmp_path: Path):
    capture(config, tmp_path / "out", model=FakeModel())
    run = rundir.read_run(tmp_path / "out", "activations")
    assert configs.from_mapping(CacheConfig, run["config"]) == config
    speeds = rundir.read_metrics(tmp_path / "out")
    assert [line["step"] for line in speeds] == list(range(len(speeds)))


# --- interrupted at every step


class Interruption(BaseException):
    pass


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Stops the process at its n-th step towards the disk (an fsync, a rename, an appended line), as a kill would."""
    budget = {"left": 10**9}

    def stopping(function):
        def wrapped(*args, **kwargs):
            budget["left"] -= 1
            if budget["left"] < 0:
                raise Interruption
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(atomic, "fsync", stopping(atomic.fsync))
    monkeypatch.setattr(atomic, "append", stopping(atomic.append))
    monkeypatch.setattr(os, "replace", stopping(os.replace))
    monkeypatch.setattr(
        Path,
        "unlink",
        lambda path, missing_ok=False, unlink=Path.unlink: (
            None if budget["left"] < 0 else unlink(path, missing_ok=missing_ok)  # a killed process cleans nothing up
        ),
    )
    return budget


def test_an_interruption_at_any_step_changes_no_byte(
    config: CacheConfig, tmp_path: Path, crash_at: dict[str, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rundir, "environment", dict)  # asking git for the revision takes longer than the capture
    capture(config, tmp_path / "whole", model=FakeModel())
    n_steps = 10**9 - crash_at["left"]
    assert n_steps > 20
    whole = artefact(tmp_path / "whole")
    for step in range(n_steps):
        out = tmp_path / f"out{step}"
        crash_at["left"] = step
        with pytest.raises(Interruption):
            capture(config, out, model=FakeModel(), resume=True)
        crash_at["left"] = 10**9
        capture(config, out, model=FakeModel(), resume=True).verify()
        assert artefact(out) == whole, f"interrupted at step {step}"
        assert not [p.name for p in out.iterdir() if atomic.is_leftover(p) or p.name == "shards.jsonl"]
        steps = [line["step"] for line in rundir.read_metrics(out)]
        assert steps == list(range(len(whole) - 5))


def test_only_the_shard_in_progress_is_captured_again(config: CacheConfig, tmp_path: Path):
    out, model = tmp_path / "out", FakeModel()
    interrupt_during_shard(2, config, out)
    capture(config, out, model=model, resume=True)
    n_shards = len(list(out.glob("shard_*")))
    assert model.n_forwards <= (n_shards - 2) * 3  # three forward passes make a shard


def interrupt_during_shard(number: int, config: CacheConfig, out: Path, *, resume: bool = False) -> None:
    n_tokens = number * config.rows_per_shard * config.context

    def stop(done: int, of: int) -> None:
        if done > n_tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(config, out, model=FakeModel(), resume=resume, progress=stop)


def test_a_torn_ledger_costs_one_shard_and_not_the_next_ones_too(config: CacheConfig, tmp_path: Path):
    out, ledger = tmp_path / "out", tmp_path / "out" / "shards.jsonl"
    interrupt_during_shard(2, config, out)
    ledger.write_text(ledger.read_text()[:-10])
    interrupt_during_shard(3, config, out, resume=True)
    model = FakeModel()
    capture(config, out, model=model, resume=True)
    n_shards = len(list(out.glob("shard_*")))
    assert model.n_forwards <= (n_shards - 3) * 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "torn line", "lost line", "garbage line"])
def test_a_damaged_half_made_store_is_repaired_by_resuming(config: CacheConfig, tmp_path: Path, damage: str):
    capture(config, tmp_path / "whole", model=FakeModel())
    out = tmp_path / "out"
    interrupt_during_shard(3, config, out)
    shard, ledger = out / "shard_00001.safetensors", out / "shards.jsonl"
    match damage:
        case "flip":
            data = bytearray(shard.read_bytes())
            data[-5] ^= 1
            shard.write_bytes(data)
        case "truncate":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "delete":
            shard.unlink()
        case "torn line":
            ledger.write_text(ledger.read_text()[:-10])
        case "lost line":
            ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[1:]))
        case "garbage line":
            ledger.write_text(ledger.read_text() + "\x00\x00\n")
    capture(config, out, model=FakeModel(), resume=True).verify()
    assert artefact(out) == artefact(tmp_path / "whole")


def test_resuming_with_other_settings_model_or_text_is_refused(config: CacheConfig, tmp_path: Path, text: Path):
    out = tmp_path / "out"
    interrupt_during_shard(2, config, out)
    with pytest.raises(ArtifactError, match=r"was started with tokens = 1000000, not 5000"):
        capture(changed(config, tokens=5000), out, model=FakeModel(), resume=True)
    with pytest.raises(ArtifactError, match="was started with another model"):
        capture(config, out, model=FakeModel(seed=1), resume=True)
    whole = text.read_text()
    text.write_text(whole.replace("Document 0", "Dokument 0"))
    with pytest.raises(ArtifactError, match=r"shard_00000.safetensors holds, it has changed"):
        capture(config, out, model=FakeModel(), resume=True)
    text.write_text("".join(whole.splitlines(keepends=True)[:8]))
    with pytest.raises(ArtifactError, match=r"the text no longer gives the tokens"):
        capture(config, out, model=FakeModel(), resume=True)
    text.write_text(whole)
    capture(config, out, model=FakeModel(), resume=True)


# --- bad input


def test_bad_settings_are_refused():
    for changes, words in [
        ({"hook_names": ()}, "hook_names"),
        ({"hook_names": ("a", "a")}, "hook_names"),
        ({"context": 1}, "context"),
        ({"tokens": 100}, "tokens"),
        ({"held_out": 1.0}, "held_out"),
        ({"batch_rows": 0}, "batch_rows"),
        ({"rows_per_shard": 0}, "rows_per_shard"),
    ]:
        with pytest.raises(ConfigError, match=words):
            CacheConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"hook_names": ["blocks.1.hook_resid_pots"]}, ConfigError, "did you mean blocks.1.hook_resid_post"),
        ({"context": 1024}, ConfigError, "exceeds the 512 tokens"),
        ({"text": {"source": "empty.txt"}}, TextError, "is empty"),
        ({"text": {"source": "short.txt"}}, TextError, "fewer tokens than one row"),
        ({"text": {"source": "latin.txt"}}, TextError, "latin.txt is not UTF-8"),
        ({"text": {"source": "missing.txt"}}, TextError, "there is no text file"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    config: CacheConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict,
    error: type[Exception],
    words: str,
):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("short")
    Path("latin.txt").write_bytes(b"\xc4rger")
    with pytest.raises(error, match=words) as caught:
        capture(changed(config, **changes), tmp_path / "out", model=FakeModel())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_bad_file_far_into_the_text_loses_nothing(config: CacheConfig, tmp_path: Path, text: Path):
    whole = text.read_text()
    text.write_bytes(whole.encode() + b'{"text": "\xff"}\n')
    with pytest.raises(TextError, match=r"text.jsonl is not UTF-8"):
        capture(config, tmp_path / "out", model=FakeModel())
    text.write_text(whole)
    capture(config, tmp_path / "out", model=FakeModel(), resume=True)
    capture(config, tmp_path / "whole", model=FakeModel())
    assert artefact(tmp_path / "out") == artefact(tmp_path / "whole")


def test_activations_that_the_dtype_cannot_hold_are_refused(config: CacheConfig, tmp_path: Path):
    model = FakeModel()
    model.tables[HOOK][ord("t"), 3] = 1e6
    with pytest.raises(ArtifactError, match="no float16 numbers"):
        capture(changed(config, dtype="float16"), tmp_path / "half", model=model)
    capture(config, tmp_path / "out", model=model)


def test_nothing_held_out_is_warned_about(config: CacheConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "one.txt").write_text("A single document. " * 20)
    store = capture(changed(config, text={"source": str(tmp_path / "one.txt")}), tmp_path / "out", model=FakeModel())
    assert len(store.rows("held_out")) == 0
    assert "no row is held out" in caplog.text


# --- a real model


def test_the_tiny_model_captures_what_it_computes(tiny_model, config: CacheConfig, tmp_path: Path):
    hooks = ["blocks.1.hook_resid_post", "blocks.2.attn.hook_z"]
    config = changed(config, hook_names=["blocks.1.hook_out", hooks[1]], dtype="float32", batch_rows=4)
    store = capture(config, tmp_path / "out", model=tiny_model)
    assert list(store.hook_names) == hooks
    store.check_model(tiny_model.weights_sha256)
    with pytest.raises(ArtifactError, match="give that model"):
        store.check_model("0" * 64)
    rows = np.arange(4)
    expected = tiny_model.capture(store.tokens(rows), hooks)
    for hook in hooks:
        torch.testing.assert_close(store.acts(hook, rows), expected[hook].float(), rtol=0, atol=0)
    reopened = ActivationStore.open(tmp_path / "out", verify="full")
    assert reopened.manifest == store.manifest
