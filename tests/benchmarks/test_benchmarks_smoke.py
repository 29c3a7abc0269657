"""Every subcommand runs from end to end on tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_ops, eager
from benchmarks.__main__ import main
from benchmarks.ours import Kernels
from benchmarks.peers.client import DEFAULT_PYTHON, Peer, PeerError
from benchmarks.peers.steps import PEERS
from benchmarks.problem import planted_problem
from benchmarks.shapes import SMOKE
from saelab_kernels import dispatch

ROOT = Path(__file__).parents[2]
PEER_PYTHON = Path(os.environ.get("SAELAB_PEER_PYTHON") or DEFAULT_PYTHON)

needs_peers = pytest.mark.skipif(
    not PEER_PYTHON.exists(), reason=f"no {PEER_PYTHON}; run make bench-peers or set SAELAB_PEER_PYTHON"
)


def rows_of(topic: str, out: Path, *options: str):
    assert main([topic, "--smoke", "--device", "cpu", "--out", str(out), *options]) == 0
    record = json.loads((out / f"{topic}_cpu.json").read_text())
    assert record["smoke"]
    assert record["machine"]["torch"] == torch.__version__
    return record["rows"]


def test_every_operation_is_checked_and_timed(tmp_path):
    rows = rows_of("ops", tmp_path)
    assert {row["op"] for row in rows} == set(bench_ops.OPS)
    for row in rows:
        assert set(row["contenders"]) | set(row["not_timed"]) > {"saelab"}, row
        assert row["floor_ms"] > 0
        assert row["contenders"]["saelab"]["median_ms"] > 0


def test_training_steps_are_timed_beside_plain_torch_and_a_process_of_their_own(tmp_path):
    control = "control: torch dense float32"
    options = (
        "--only",
        "torch dense float32,torch sparse float32",
        "--peers",
        control,
        "--peer-python",
        sys.executable,
    )
    (row,) = rows_of("train", tmp_path, *options)
    assert {"saelab", "saelab_kernels", "torch dense float32", "torch sparse float32", control} <= set(
        row["contenders"]
    )
    same = row["contenders"]["torch dense float32"]["held_out_error"]
    for name in ("saelab", "saelab_kernels", "torch sparse float32"):
        assert row["contenders"][name]["held_out_error"] == pytest.approx(same, rel=1e-3), name


def test_search_is_checked_and_timed(tmp_path):
    rows = rows_of("search", tmp_path)
    assert [row["what"] for row in rows] == ["relu", "jumprelu", "topk"]
    for row in rows:
        assert row["identical_for_chunkings"]
        assert row["contenders"]["saelab"]["median_ms"] > 0


def test_the_gpu_script_runs_on_the_cpu_too(tmp_path):
    done = subprocess.run(
        ["bash", "benchmarks/gpu_run.sh", "--smoke"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {"ops_cpu.json", "search_cpu.json", "train_cpu.json"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("setting", [{"TEST_SECONDS": "0.01"}, {"PYTHON": "/does/not/exist"}])
def test_the_gpu_script_times_nothing_after_a_failure(setting, tmp_path):
    done = subprocess.run(
        ["bash", "benchmarks/gpu_run.sh", "--smoke"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)} | setting,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert not list(tmp_path.iterdir())


def test_the_benchmarks_need_nothing_but_torch_triton_and_numpy(tmp_path):
    """In a process whose other packages are hidden."""
    hidden = "saelab jaxtyping safetensors einops transformers transformer_lens scipy datasets rich typer pyarrow"
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden.split()!r}))\n"
        "from benchmarks.__main__ import main\n"
        f"options = ['--smoke', '--device', 'cpu', '--out', {str(tmp_path)!r}]\n"
        "assert main(['ops', '--ops', 'pairs_by_feature', *options]) == 0\n"
        "assert main(['train', '--only', 'none', *options]) == 0\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads((tmp_path / "train_cpu.json").read_text())["rows"]
    assert "saelab_kernels" in row["contenders"]
    assert "saelab" in row["not_timed"]


def test_steps_in_plain_torch_are_the_dense_one(monkeypatch):
    monkeypatch.setattr(dispatch, "bfloat16_units", lambda _: False)  # AuxK in float32, as torch's steps have it
    problem = planted_problem(SMOKE[0], "cpu")
    steps = {"dense": eager.Dense(problem), "sparse": eager.Sparse(problem), "kernels": Kernels(problem)}
    for index in range(3):
        for step in steps.values():
            step.step(problem.batch(index))
    for name in ("sparse", "kernels"):
        for found, expected in zip(steps[name].weights, steps["dense"].weights, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_peer_that_is_not_installed_says_so():
    with pytest.raises(PeerError, match="dictionary_learning: ModuleNotFoundError: No module named"):
        Peer("dictionary_learning", planted_problem(SMOKE[0], "cpu"), Path(sys.executable))


@pytest.mark.peer
@needs_peers
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_makes_steps_that_learn(name):
    problem = planted_problem(SMOKE[0], "cpu")
    with Peer(name, problem, PEER_PYTHON) as peer:
        before = peer.held_out_error()
        assert all(peer.seconds(index) > 0 for index in range(4))
        assert peer.held_out_error() < before
        assert peer.version


@pytest.mark.peer
@needs_peers
def test_equal_loss_is_compared_on_the_same_tokens(tmp_path):
    (row,) = rows_of("quality", tmp_path, "--peer-python", str(PEER_PYTHON))
    assert row["our_error_over_theirs"]["sae-lens"] == pytest.approx(1, abs=0.1)
