"""Several processes on one capture: the bytes are those of one process, whoever is killed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import random
import time
from pathlib import Path

import pytest
from activations_fake_model import FakeModel
from activations_worker import Worker

from saelab import atomic, rundir
from saelab.activations.capture import CacheConfig, capture
from saelab.activations.claims import Claims
from saelab.activations.store import ActivationStore, map_shard
from saelab.config import from_mapping
from saelab.errors import ArtifactError

CONFIG = {
    "model": "whatever",
    "hook_names": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"],
    "tokens": 20_000,
    "context": 32,
    "held_out": 0.1,
    "rows_per_shard": 16,
    "batch_rows": 2,
}


def artefact(path: Path) -> dict[str, str]:
    names = ["manifest.json", "documents.jsonl", *(file.name for file in sorted(path.glob("shard_*")))]
    return {name: atomic.sha256(path / name) for name in names}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    lines = [{"text": f"Document {i} says {'that the river and the tower ' * 5}."} for i in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"text": {"source": str(folder / "text.jsonl")}}))
    return folder / "config.json"


@pytest.fixture(scope="module")
def config(config_file: Path) -> CacheConfig:
    return from_mapping(CacheConfig, json.loads(config_file.read_text()))


@pytest.fixture(scope="module")
def whole(config: CacheConfig, config_file: Path) -> dict[str, str]:
    """What one undisturbed process makes."""
    model = FakeModel()
    capture(config, config_file.parent / "whole", model=model)
    return artefact(config_file.parent / "whole") | {"forwards": str(model.n_forwards)}


def check(out: Path, whole: dict[str, str]) -> None:
    """The store in ``out`` is ``whole``, and nothing else is left."""
    assert artefact(out) | {"forwards": whole["forwards"]} == whole
    ActivationStore.open(out, verify="full")
    assert [line["step"] for line in rundir.read_metrics(out)] == list(range(len(whole) - 3))
    kept = {"DONE", "run.json", "env.json", "parents.json", "metrics.jsonl"}
    assert {file.name for file in out.iterdir()} == (set(whole) - {"forwards"}) | kept
    assert not list(out.parent.glob("*.part-*"))


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def wait_for_shards(out: Path, n: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("shard_*.safetensors"))) < n:
        assert time.monotonic() < deadline
        time.sleep(1e-3)


def wait_until_shared(out: Path) -> None:
    """Until another process takes part in the capture; it may have been slow to start."""
    deadline = time.monotonic() + 60
    with out.with_name(f"{out.name}.part-claims").open("r+b") as file:
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            except OSError:
                return
            fcntl.lockf(file, fcntl.LOCK_UN, 1, 0)
            assert time.monotonic() < deadline
            time.sleep(1e-3)


def test_three_processes_make_what_one_makes_and_no_shard_twice(
    config_file: Path, whole: dict[str, str], tmp_path: Path
):
    out = tmp_path / "out"
    crew = [Worker(out, config_file, join=join) for join in (True, True, False)]
    shares = [worker.forwards() for worker in crew]
    check(out, whole)
    assert sum(shares) == int(whole["forwards"])
    assert all(shares)


def test_what_a_killed_process_had_begun_another_takes_over(config_file: Path, whole: dict[str, str], tmp_path: Path):
    out = tmp_path / "out"
    crew = [Worker(out, config_file, join=join) for join in (True, True, False)]
    wait_for_shards(out, 3)
    for worker in crew[1:]:  # the founder is one of them
        worker.kill()
    assert not (out / "DONE").exists()
    (out / "shard_00009.safetensors.part-1-dead").write_bytes(b"what a kill in the middle of a write leaves")
    assert crew[0].forwards() > 0
    check(out, whole)


def randomly_killed(config_file: Path, whole: dict[str, str], out: Path, *, kills: int, seed: int) -> int:
    """Three processes, of which one after the other is killed and replaced; how many were killed at work."""
    rng = random.Random(seed)
    crew = [Worker(out, config_file, join=join) for join in (True, True, False)]
    wait_for(out / "run.json")
    n_at_work = 0
    for _ in range(kills):
        time.sleep(rng.uniform(0, 0.15))
        crew.pop(rng.randrange(len(crew))).kill()
        n_at_work += not (out / "DONE").exists()
        crew.append(Worker(out, config_file, join=True))
    for worker in crew:
        worker.forwards()
    check(out, whole)
    return n_at_work


@pytest.mark.slow
def test_twenty_kills_among_three_processes_change_no_byte(config_file: Path, whole: dict[str, str], tmp_path: Path):
    n_at_work = 0
    for seed in range(20):
        if n_at_work >= 20:
            break
        n_at_work += randomly_killed(config_file, whole, tmp_path / str(seed), kills=3, seed=seed)
    assert n_at_work >= 20


def test_a_second_writer_that_was_not_asked_is_refused_and_says_how_to_help(
    config: CacheConfig, config_file: Path, whole: dict[str, str], tmp_path: Path
):
    out = tmp_path / "out"
    first = Worker(out, config_file)
    wait_for_shards(out, 1)
    who = rf"being written by another process \(process {first.process.pid} on .*--join"
    with pytest.raises(ArtifactError, match=who):
        capture(config, out, model=FakeModel(), resume=True)
    with pytest.raises(ArtifactError, match="already holds an unfinished run"):
        capture(config, out, model=FakeModel())
    first.forwards()
    check(out, whole)


def test_helpers_of_a_killed_founder_keep_others_from_resuming(
    config: CacheConfig, config_file: Path, whole: dict[str, str], tmp_path: Path
):
    out = tmp_path / "out"
    helper, founder = Worker(out, config_file, join=True), Worker(out, config_file)
    wait_for_shards(out, 4)
    founder.kill()
    wait_until_shared(out)
    with pytest.raises(ArtifactError, match="is being written by another process"):
        capture(config, out, model=FakeModel(), resume=True)
    helper.forwards()
    check(out, whole)


def test_helpers_with_other_settings_model_or_text_are_refused(
    config: CacheConfig, config_file: Path, whole: dict[str, str], tmp_path: Path
):
    out = tmp_path / "out"
    first = Worker(out, config_file)
    wait_for(out / "shards.jsonl")  # also before there is a shard it is known whose they will be
    with pytest.raises(ArtifactError, match="was started with batch_rows = 2, not 4"):
        capture(from_mapping(CacheConfig, json.loads(config_file.read_text()) | {"batch_rows": 4}), out, join=True)
    with pytest.raises(ArtifactError, match="was started with another model"):
        capture(config, out, model=FakeModel(seed=1), join=True)
    first.forwards()
    check(out, whole)


def test_a_helper_that_reads_another_text_stops_at_its_first_shard(config: CacheConfig, tmp_path: Path):
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"Document {i} says {'that the river and the tower ' * 5}."}) for i in range(60)]
    text.write_text("\n".join(lines) + "\n")
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(CONFIG | {"text": {"source": str(text)}}))
    out = tmp_path / "out"
    first = Worker(out, config_file)
    wait_for_shards(out, 2)
    text.write_text("\n".join(lines).replace("Document 0", "Dokument 0") + "\n")
    other = from_mapping(CacheConfig, json.loads(config_file.read_text()))
    with pytest.raises(ArtifactError, match=r"shard_00000.safetensors holds, it has changed"):
        capture(other, out, model=FakeModel(), join=True)
    first.forwards()


def test_there_must_be_something_to_join(config: CacheConfig, tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"there is no capture in .* to join; start one with"):
        capture(config, tmp_path / "out", model=FakeModel(), join=True)
    assert not list(tmp_path.iterdir())


def test_a_helper_that_finds_no_one_left_goes_on_alone_and_checks_what_is_there(
    config: CacheConfig, config_file: Path, whole: dict[str, str], tmp_path: Path
):
    out = tmp_path / "out"
    first = Worker(out, config_file)
    wait_for_shards(out, 4)
    first.kill()
    shard = out / "shard_00001.safetensors"
    spoiled = bytearray(shard.read_bytes())
    spoiled[-5] ^= 1
    shard.write_bytes(spoiled)
    capture(config, out, model=FakeModel(), join=True)
    check(out, whole)


def test_a_helper_of_a_finished_capture_has_nothing_to_do(config: CacheConfig, tmp_path: Path):
    capture(config, tmp_path / "out", model=FakeModel())
    model = FakeModel()
    capture(config, tmp_path / "out", model=model, join=True)
    assert model.n_forwards == 0


def test_readers_beside_writers_see_whole_shards_only(config_file: Path, whole: dict[str, str], tmp_path: Path):
    out = tmp_path / "out"
    crew = [Worker(out, config_file, join=True), Worker(out, config_file)]
    n_seen = 0
    while any(worker.is_alive for worker in crew):
        for file in out.glob("shard_*.safetensors"):
            assert atomic.sha256(file) == whole[file.name]
            assert map_shard(file)["tokens"].shape[1] == 32
            n_seen += 1
        with contextlib.suppress(ArtifactError):  # unfinished; once it opens it must be whole
            ActivationStore.open(out, verify="full")
    for worker in crew:
        worker.forwards()
    assert n_seen > 10
    check(out, whole)


# --- locks


def test_a_file_system_without_locks_serves_one_process_and_says_so(
    config: CacheConfig,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def refusing(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refusing)
    capture(config, tmp_path / "out", model=FakeModel())
    assert "has no locks, so a second writer would not be noticed" in caplog.text
    check(tmp_path / "out", whole)
    (tmp_path / "out" / "DONE").unlink()
    with pytest.raises(ArtifactError, match="has no locks, so processes cannot share a capture"):
        capture(config, tmp_path / "out", model=FakeModel(), join=True)


def test_the_file_of_the_locks_goes_with_the_last_one_to_leave(config: CacheConfig, tmp_path: Path):
    file = tmp_path / "out.part-claims"
    claims = Claims(tmp_path / "out")
    assert claims.found()
    assert file.exists()
    file.unlink()  # as if another process had been the last to leave, after this one opened the file
    claims.share()
    assert file.exists()
    claims.close()
    assert not file.exists()
