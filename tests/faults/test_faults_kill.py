"""kill -9 at random moments: what is resumed ends with the same bytes as what was never disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from saelab import atomic, rundir
from saelab.metrics import TIMINGS

DRIVER = Path(__file__).with_name("kill_driver.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def contents(path: Path) -> dict[str, str]:
    """Hash of every file, without the clock: timings in the metrics, env.json."""
    hashes = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "env.json"):
        name = str(file.relative_to(path))
        if file.name == "metrics.jsonl":
            hashes[name] = json.dumps(
                [{k: v for k, v in line.items() if k not in TIMINGS} for line in rundir.read_metrics(file.parent)]
            )
        else:
            hashes[name] = atomic.sha256(file)
    return hashes


def run(*command: object) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def killed_equals_whole(tmp_path: Path, n_kills: int, start: list[object]) -> None:
    """Both runs happen in the same place, one after the other, because parents.json holds relative paths."""
    out = tmp_path / "out"
    run("-m", "saelab", *start, "--out", out)
    whole = contents(out)
    out.rename(tmp_path / "whole")
    print(run(DRIVER, n_kills, 0, out, *start))
    assert contents(out) == whole
    assert not list(out.rglob("*.part-*"))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.jsonl"
    lines = ({"text": " ".join(f"{doc} times {i} is {doc * i}." for i in range(1, 60))} for doc in range(2, 90))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def cache_command(model: Path, text: Path) -> list[object]:
    return [
        "cache",
        "--model",
        model,
        "--text",
        text,
        "--hook",
        "blocks.1.hook_resid_post",
        "--tokens",
        30_720,
        "--set",
        "context=64",
        "--set",
        "rows_per_shard=32",
        "--set",
        "held_out=0.1",
    ]


@pytest.fixture(scope="module")
def activations(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("store") / "activations"
    run("-m", "saelab", *cache_command(tiny_model_dir, text_file), "--out", out)
    return out


def train_command(activations: Path) -> list[object]:
    return [
        "train",
        activations,
        "--expansion",
        8,
        "--k",
        4,
        "--tokens",
        100_000,
        "--set",
        "batch_size=256",
        "--set",
        "checkpoint_every=15",
        "--set",
        "log_every=3",
    ]


def test_killing_capture_three_times_changes_nothing(tiny_model_dir: Path, text_file: Path, tmp_path: Path):
    killed_equals_whole(tmp_path, 3, cache_command(tiny_model_dir, text_file))


def test_killing_training_three_times_changes_nothing(activations: Path, tmp_path: Path):
    killed_equals_whole(tmp_path, 3, train_command(activations))


GRID = """
tokens = 20_480
batch_size = 256
checkpoint_every = 15
log_every = 3
[[grid]]
sae = { arch = "batchtopk", d_sae = 96, k = 4 }
ema_decay = 0.99
[[grid]]
sae = { arch = "relu", d_sae = 96, l1_coefficient = 0.1 }
target_l0 = 6.0
[[grid]]
sae = { arch = "jumprelu", d_sae = 96 }
target_l0 = 6.0
ema_decay = 0.99
[[grid]]
sae = { arch = "matryoshka", d_sae = 96, k = 4 }
seed = 1
"""


@pytest.fixture
def sweep_command(activations: Path, tmp_path: Path) -> list[object]:
    """Everything that a checkpoint may hold: the average, the controller, thresholds, random prefixes; two streams."""
    file = tmp_path / "grid.toml"
    file.write_text(GRID)
    return ["train", activations, "--sweep", file]


def test_killing_a_sweep_twice_changes_nothing(sweep_command: list[object], tmp_path: Path):
    killed_equals_whole(tmp_path, 2, sweep_command)
    for name in ("batchtopk", "relu", "jumprelu", "matryoshka"):
        assert (tmp_path / "out" / name / "DONE").exists()
        steps = [line["step"] for line in rundir.read_metrics(tmp_path / "out" / name)]
        assert steps == [*range(3, 80, 3), 80]


@pytest.mark.long
def test_killing_a_sweep_twenty_times_changes_nothing(sweep_command: list[object], tmp_path: Path):
    killed_equals_whole(tmp_path, 20, sweep_command)


def test_killing_an_indexing_twice_changes_nothing(activations: Path, tmp_path: Path):
    run("-m", "saelab", *train_command(activations), "--out", tmp_path / "sae")
    killed_equals_whole(tmp_path, 2, ["index", tmp_path / "sae"])


@pytest.mark.slow
def test_killing_an_indexing_twenty_times_changes_nothing(activations: Path, tmp_path: Path):
    run("-m", "saelab", *train_command(activations), "--out", tmp_path / "sae")
    killed_equals_whole(tmp_path, 20, ["index", tmp_path / "sae"])


@pytest.mark.slow
def test_killing_capture_twenty_times_changes_nothing(tiny_model_dir: Path, text_file: Path, tmp_path: Path):
    killed_equals_whole(tmp_path, 20, cache_command(tiny_model_dir, text_file))


@pytest.mark.slow
def test_killing_training_twenty_times_changes_nothing(activations: Path, tmp_path: Path):
    killed_equals_whole(tmp_path, 20, train_command(activations))


@pytest.mark.slow
@pytest.mark.demo
def test_killing_capture_of_the_demo_model_changes_nothing(demo_model, tmp_path: Path):
    killed_equals_whole(
        tmp_path, 1, ["cache", "--tokens", 16_384, "--set", "rows_per_shard=16", "--set", "held_out=0.1"]
    )


@pytest.mark.slow
@pytest.mark.demo
def test_killing_training_on_the_demo_model_changes_nothing(demo_model, tmp_path: Path):
    activations = tmp_path / "activations"
    run("-m", "saelab", "cache", "--tokens", 16_384, "--set", "held_out=0.1", "--out", activations)
    killed_equals_whole(
        tmp_path,
        1,
        [
            "train",
            activations,
            "--k",
            32,
            "--tokens",
            40_960,
            "--set",
            "batch_size=1024",
            "--set",
            "checkpoint_every=10",
        ],
    )
