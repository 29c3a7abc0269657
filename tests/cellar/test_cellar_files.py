from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saelab import atomic, rundir
from saelab.checkpoint import Checkpoints
from saelab.errors import ArtifactError, nearest
from saelab.interrupts import deferred
from saelab.rundir import StageWriter


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    file = tmp_path / "a.json"
    atomic.write_json(file, {"old": 1})
    with pytest.raises(RuntimeError), atomic.replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(file.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupted_directory_leaves_the_old_one_and_nothing_else(tmp_path: Path):
    for content in ("old", "new"):
        with atomic.replacing_directory(tmp_path / "d") as folder:
            (folder / "f").write_text(content)
    with pytest.raises(RuntimeError), atomic.replacing_directory(tmp_path / "d") as folder:
        (folder / "f").write_text("half")
        raise RuntimeError
    assert (tmp_path / "d" / "f").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_a_failed_swap_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with atomic.replacing_directory(tmp_path / "d") as folder:
        (folder / "f").write_text("old")
    real, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match="no") as raised, atomic.replacing_directory(tmp_path / "d") as folder:
        (folder / "f").write_text("new")
    assert raised.value.__cause__ is None  # an error that caused itself would send readers of the chain in circles
    assert (tmp_path / "d" / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_json_refuses_not_a_number(tmp_path: Path):
    with pytest.raises(ValueError, match="Out of range float"):
        atomic.write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path: Path):
    program = """
import resource, sys
from pathlib import Path
from saelab import atomic
from saelab.errors import ArtifactError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    atomic.write_bytes(Path(sys.argv[1]), b"x" * 100_000)
except ArtifactError as error:
    print(error)
"""
    file = tmp_path / "big"
    file.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"no space left to write {file}")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_sweeping_removes_what_a_killed_writer_left(tmp_path: Path):
    (tmp_path / "a.part-1-abc").write_text("half")
    (tmp_path / "d.part-1-abc").mkdir()
    (tmp_path / "keep").write_text("whole")
    atomic.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


def test_a_directory_left_by_a_killed_writer_goes_when_it_is_written_again(tmp_path: Path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / f"index.part-{dead.stdout.strip()}-abc123").mkdir()
    (tmp_path / f"index.part-{os.getpid()}-abc123").mkdir()
    with atomic.replacing_directory(tmp_path / "index") as folder:
        (folder / "f").write_text("whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index", f"index.part-{os.getpid()}-abc123"]


def test_what_a_killed_writer_left_is_no_stage(tmp_path: Path):
    StageWriter.create(tmp_path / "index.part-1-abc", stage="index", config={}).finish()
    with pytest.raises(ArtifactError, match="holds no index directory"):
        rundir.find(tmp_path, "index")


def test_an_unfinished_index_is_made_again_not_resumed(tmp_path: Path):
    StageWriter.create(tmp_path / "index", stage="index", config={})
    with pytest.raises(ArtifactError, match="unfinished; make it again with: saelab index"):
        rundir.find(tmp_path, "index")


def test_a_stage_is_unfinished_until_done(tmp_path: Path):
    run = StageWriter.create(tmp_path / "sae", stage="sae", config={"a": 1})
    with pytest.raises(ArtifactError, match=r"unfinished; continue it with: saelab train --resume"):
        rundir.find(tmp_path, "sae")
    run.finish()
    assert rundir.find(tmp_path, "sae") == tmp_path / "sae"
    assert rundir.find(tmp_path / "sae", "sae") == tmp_path / "sae"


def test_a_workspace_with_two_candidates_asks_which(tmp_path: Path):
    for name in ("a", "b"):
        StageWriter.create(tmp_path / name, stage="sae", config={}).finish()
    with pytest.raises(ArtifactError, match=r"several sae directories \(a, b\)"):
        rundir.find(tmp_path, "sae")
    with pytest.raises(ArtifactError, match="holds no index directory"):
        rundir.find(tmp_path, "index")


def test_a_missing_directory_suggests_its_sibling(tmp_path: Path):
    (tmp_path / "demo").mkdir()
    with pytest.raises(ArtifactError, match=r"did you mean demo"):
        rundir.find(tmp_path / "dmeo", "sae")


def test_a_changed_input_is_an_error(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "manifest.json").write_text("1")
    run = StageWriter.create(tmp_path / "out", stage="sae", config={}, parents={"activations": tmp_path / "in"})
    rundir.check_parents(run.path)
    assert rundir.parent(run.path, "activations") == tmp_path / "in"
    (tmp_path / "in" / "manifest.json").write_text("2")
    with pytest.raises(ArtifactError, match="has changed since"):
        StageWriter.resume(run.path, stage="sae")
    with pytest.raises(ArtifactError, match="of the stage 'sae', not of 'eval'"):
        StageWriter.resume(run.path, stage="eval")


def test_a_run_does_not_overwrite_another(tmp_path: Path):
    StageWriter.create(tmp_path / "out", stage="sae", config={})
    with pytest.raises(ArtifactError, match="already holds an unfinished run"):
        StageWriter.create(tmp_path / "out", stage="sae", config={})


def test_a_result_replaces_its_older_self_and_nothing_else(tmp_path: Path):
    rundir.check_replaceable(tmp_path / "new", "eval")
    StageWriter.create(tmp_path / "eval", stage="eval", config={})
    rundir.check_replaceable(tmp_path / "eval", "eval")
    StageWriter.create(tmp_path / "sae", stage="sae", config={})
    with pytest.raises(ArtifactError, match="holds the stage 'sae', which this result would replace"):
        rundir.check_replaceable(tmp_path / "sae", "eval")
    with pytest.raises(ArtifactError, match="holds other files, which this result would replace"):
        rundir.check_replaceable(tmp_path, "eval")


def test_files_that_are_no_run_are_not_called_one(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="already holds other files"):
        StageWriter.create(tmp_path, stage="sae", config={})


def test_inputs_are_found_through_a_linked_folder(tmp_path: Path):
    (tmp_path / "far" / "away" / "runs").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "far" / "away" / "runs")
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts" / "manifest.json").write_text("1")
    parents = {"activations": tmp_path / "acts"}
    run = StageWriter.create(tmp_path / "runs" / "sae", stage="sae", config={}, parents=parents)
    assert rundir.parent(run.path, "activations") == tmp_path / "acts"
    rundir.check_parents(run.path)


def test_an_emptied_input_is_an_error(tmp_path: Path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "manifest.json").write_text("1")
    run = StageWriter.create(tmp_path / "out", stage="sae", config={}, parents={"activations": tmp_path / "in"})
    (tmp_path / "in" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="has no manifest"):
        rundir.check_parents(run.path)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_run_json_is_named(tmp_path: Path, content: str):
    run = StageWriter.create(tmp_path / "sae", stage="sae", config={})
    run.finish()
    (run.path / "run.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"run\.json is damaged"):
        rundir.read_run(run.path, "sae")


def test_resuming_sweeps_half_written_checkpoints_too(tmp_path: Path):
    run = StageWriter.create(tmp_path / "sae", stage="sae", config={})
    Checkpoints(run.path / "checkpoints").save(7, {"w": torch.zeros(1)}, {})
    (run.path / "checkpoints" / "step_000000009.part-1-abcde1").mkdir()
    with pytest.raises(ArtifactError, match="unfinished at step 7; continue"):
        rundir.check_done(run.path)
    StageWriter.resume(run.path, stage="sae")
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["step_000000007"]


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="a folder on the way to it is a file"):
        StageWriter.create(tmp_path / "file" / "out", stage="sae", config={})


def test_rewinding_metrics_drops_later_and_torn_lines(tmp_path: Path):
    run = StageWriter.create(tmp_path / "out", stage="sae", config={})
    for step in (1, 2, 3):
        run.log({"step": step, "loss": step / 3})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run.rewind_metrics(2)
    assert [line["step"] for line in rundir.read_metrics(run.path)] == [1, 2]


def test_checkpoints_round_trip_and_prune(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=30)
    for step in (10, 20, 30, 40, 50):
        checkpoints.save(step, {"w": torch.full((3,), float(step))}, {"note": step})
    assert checkpoints.steps() == [30, 40, 50]
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest.step, latest.state) == (50, {"note": 50})
    torch.testing.assert_close(latest.tensors["w"], torch.full((3,), 50.0))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": torch.zeros(100)}, {})
    file = tmp_path / "step_000000001" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged"):
        checkpoints.latest()


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_checkpoint_without_one_of_its_files_is_refused(tmp_path: Path, name: str):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": torch.zeros(100)}, {})
    (tmp_path / "step_000000001" / name).unlink()
    with pytest.raises(ArtifactError, match="is damaged"):
        checkpoints.latest()


def test_a_half_written_checkpoint_is_invisible(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": torch.zeros(1)}, {})
    (tmp_path / "step_000000002.part-7-abc").mkdir()
    assert checkpoints.steps() == [1]


def test_ctrl_c_waits_for_the_end_of_the_step_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with deferred() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_nearest_names_close_spellings_first():
    assert nearest("resid_pots", ["resid_post", "mlp_out"]) == "did you mean resid_post?"
    assert nearest("zzz", ["a", "b"]) == "known: a, b"
