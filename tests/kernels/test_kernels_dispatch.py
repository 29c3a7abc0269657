"""Which path runs, and that it says why."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from saelab_kernels import candidate_gemm, choose, compiled, dispatch

CPU = torch.device("cpu")
KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.mark.parametrize(
    ("asked", "n_features", "k", "name", "reason"),
    [
        ("auto", 4608, 32, "cpu", "on the CPU"),
        ("auto", 64, 32, "reference", "dense is faster"),
        ("reference", 4608, 32, "reference", "SAELAB_KERNELS=reference"),
        ("cpu", 64, 32, "cpu", "SAELAB_KERNELS=cpu"),
    ],
)
def test_the_choice_follows_the_environment_and_the_shape(asked, n_features, k, name, reason, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", asked)
    choice = choose(CPU, n_features=n_features, k=k)
    assert choice.name == name
    assert reason in choice.reason


def test_without_a_setting_the_choice_is_automatic(monkeypatch):
    monkeypatch.delenv("SAELAB_KERNELS", raising=False)
    assert choose(CPU, n_features=4608, k=32).name == "cpu"
    assert choose(torch.device("meta"), n_features=4608, k=32) == ("reference", "there is no tuned path for meta")


def test_on_a_gpu_the_fused_kernels_gather_only_where_few_features_are_active(monkeypatch):
    monkeypatch.delenv("SAELAB_KERNELS", raising=False)
    monkeypatch.setattr(compiled, "unavailable", lambda: None)
    gpu = torch.device("cuda")
    assert choose(gpu, n_features=65536, k=64).name == "fused"
    assert choose(gpu, n_features=4608, k=64).name == "reference"
    assert choose(gpu, n_features=4608, k=64, gathers=False).name == "fused"


def test_fused_kernels_that_cannot_run_here_are_refused_by_name_and_replaced_by_auto(monkeypatch):
    monkeypatch.setattr(compiled, "unavailable", lambda: "there is no CUDA device")
    monkeypatch.delenv("SAELAB_KERNELS", raising=False)
    assert choose(torch.device("cuda"), n_features=65536, k=64) == ("reference", "there is no CUDA device")
    monkeypatch.setenv("SAELAB_KERNELS", "fused")
    with pytest.raises(ValueError, match="SAELAB_KERNELS=fused, but there is no CUDA device"):
        choose(CPU, n_features=65536, k=64)


def test_a_kernel_that_does_not_compile_is_replaced_once_and_said(monkeypatch, caplog):
    errors = pytest.importorskip("triton.runtime.errors")
    monkeypatch.setattr(compiled, "_failed", {})
    attempts = []

    def fails() -> str:
        attempts.append(1)
        raise errors.OutOfResources(300_000, 228_000, "shared memory")

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert compiled.or_else("encode_emit", fails, lambda: "torch", strict=False) == "torch"
    assert len(attempts) == 1
    assert [record.message for record in caplog.records if "encode_emit" in record.message]
    assert len(caplog.records) == 1
    with pytest.raises(errors.OutOfResources):
        compiled.or_else("encode_emit", fails, lambda: "torch", strict=True)


def test_an_unknown_path_and_the_cpu_path_for_another_device_are_refused(monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "fast")
    with pytest.raises(ValueError, match="must be one of auto, reference, cpu, fused, got 'fast'"):
        choose(CPU, n_features=4608, k=32)
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    with pytest.raises(ValueError, match="the tensors are on cuda"):
        choose(torch.device("cuda"), n_features=4608, k=32)


@pytest.mark.parametrize(
    ("seconds", "name"), [((1.0, 3.0), "bfloat16"), ((1.0, 1.0), "float32"), ((9.0, 1.0), "float32")]
)
def test_candidates_use_bfloat16_only_where_it_was_measured_to_be_faster(seconds, name, monkeypatch):
    times = dict(zip((torch.bfloat16, torch.float32), seconds, strict=True))
    monkeypatch.setattr(dispatch, "_matmul_seconds", times.get)
    candidate_gemm.cache_clear()
    try:
        choice = candidate_gemm()
    finally:
        candidate_gemm.cache_clear()
    assert choice.name == name
    assert f"{seconds[1] / seconds[0]:.1f}x" in choice.reason


def test_the_measurement_is_made_once_a_process(monkeypatch):
    first = candidate_gemm()
    monkeypatch.setattr(dispatch, "_matmul_seconds", lambda dtype: pytest.fail("measured again"))
    assert candidate_gemm() == first


def test_a_fallback_states_its_reason_once(caplog, monkeypatch):
    monkeypatch.delenv("SAELAB_KERNELS", raising=False)
    dispatch._stated.cache_clear()
    with caplog.at_level(logging.INFO, logger="saelab_kernels.dispatch"):
        for _ in range(3):
            choose(CPU, n_features=20, k=19)
    assert [record.message for record in caplog.records if "k=19" in record.message] == [
        "saelab_kernels uses reference: k=19 is more than 1/8 of 20 features: dense is faster"
    ]


def test_the_kernels_warn_about_nothing_and_need_torch_and_numpy_alone():
    code = (
        "import sys, torch, saelab_kernels as sk; W = torch.randn(300, 8); "
        "sk.encode_topk(torch.randn(4, 8), W, torch.zeros(300), 5); "
        "sys.exit('saelab' in sys.modules or 'jaxtyping' in sys.modules or 'scipy' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=KERNELS, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
