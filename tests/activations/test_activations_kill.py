"""SIGKILL and a full disk, in processes of their own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from activations_fake_model import FakeModel

from saelab import atomic
from saelab.activations.capture import CacheConfig, capture
from saelab.activations.store import ActivationStore
from saelab.config import from_mapping

SCRIPT = Path(__file__).with_name("capture_in_subprocess.py")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    lines = [{"text": f"Document {i} says {'that the river and the tower ' * 5}."} for i in range(200)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "model": "whatever",
        "hook_names": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"],
        "text": {"source": str(tmp_path / "text.jsonl")},
        "tokens": 20_000,
        "context": 32,
        "held_out": 0.1,
        "rows_per_shard": 16,
        "batch_rows": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "config.json"


def start(out: Path, config_file: Path, model: str, *limit: str) -> subprocess.Popen[str]:
    """A capture whose imports are done."""
    command = [sys.executable, str(SCRIPT), str(out), str(config_file), model, *limit]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def rest_of(process: subprocess.Popen[str]) -> str:
    """What it still printed. (``communicate`` would miss what lies in the buffer of ``stdout`` already.)"""
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read()
    process.wait(timeout=300)
    return output


def artefact(path: Path) -> dict[str, str]:
    names = ["manifest.json", "documents.jsonl", *(file.name for file in sorted(path.glob("shard_*")))]
    return {name: atomic.sha256(path / name) for name in names}


def complete(out: Path, config_file: Path, model: str) -> float:
    """Run the capture in ``out`` to its end; the seconds it took."""
    if model == "fake":  # in this process, which has torch loaded already
        config = from_mapping(CacheConfig, json.loads(config_file.read_text()))
        began = time.monotonic()
        capture(config, out, model=FakeModel(seconds_per_forward=0.002), resume=True)
        return time.monotonic() - began
    process = start(out, config_file, model)
    began = time.monotonic()
    assert process.stdout is not None
    assert process.stdout.readline() == "done\n"
    seconds = time.monotonic() - began
    assert rest_of(process) == ""
    return seconds


def killed_and_resumed(config_file: Path, model: str, *, kills: int) -> None:
    """Kill a capture ``kills`` times at random moments, let it finish, and compare with one that nobody disturbed."""
    folder = config_file.parent
    seconds = complete(folder / "whole", config_file, model)
    whole = artefact(folder / "whole")
    assert len(whole) > 20

    rng = random.Random(0)
    n_in_progress = 0
    for attempt in range(kills):
        out = folder / f"out{attempt // 4}"  # up to four kills in a row, each a part of the way, before it may finish
        process = start(out, config_file, model)
        time.sleep(rng.uniform(0, seconds / 3))
        process.kill()
        n_in_progress += rest_of(process) != "done\n"
        if attempt % 4 == 3 or attempt == kills - 1:
            complete(out, config_file, model)
            assert artefact(out) == whole
            assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (folder / "whole").iterdir())
            ActivationStore.open(out, verify="full")
    assert n_in_progress >= kills / 2


def test_three_kills_change_no_byte(config_file: Path):
    killed_and_resumed(config_file, "fake", kills=3)


def test_a_full_disk_is_one_sentence_and_the_capture_can_go_on(config_file: Path, tmp_path: Path):
    complete(tmp_path / "whole", config_file, "fake")
    shard = (tmp_path / "whole" / "shard_00000.safetensors").stat().st_size
    out = tmp_path / "out"
    for limit in (100, shard // 2):
        sentence, done, _ = rest_of(start(out, config_file, "fake", str(limit))).split("\n")
        assert done == "done"
        assert sentence.startswith("no space left to write")
        assert not list(out.glob("*.part-*"))
        assert not list(out.glob("shard_*"))
    complete(out, config_file, "fake")
    assert artefact(out) == artefact(tmp_path / "whole")
