"""Correct first, timed second: what is wrong, or interpreted, gets no speed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bench_ops, bench_search, ours
from benchmarks.__main__ import REFUSED, main


@pytest.fixture
def smoke(tmp_path):
    """Runs a smoke benchmark and gives exit status and rows."""

    def run(topic: str, *options: str):
        status = main([topic, "--smoke", "--device", "cpu", "--out", str(tmp_path), *options])
        path = tmp_path / f"{topic}_cpu.json"
        return status, json.loads(path.read_text())["rows"] if path.exists() else None

    return run


def test_a_wrong_result_gets_no_time(smoke, monkeypatch, capsys):
    from saelab_kernels.decode import cpu

    right = cpu.sparse_decode
    monkeypatch.setattr(cpu, "sparse_decode", lambda *arguments: right(*arguments) * 1.001)
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    status, rows = smoke("ops", "--ops", "sparse_decode,pairs_by_feature")
    assert status == REFUSED
    wrong = next(row for row in rows if row["op"] == "sparse_decode" and row["what"] == "forward")
    assert wrong["contenders"] == {}
    assert "wrong: error 1.0e-03" in wrong["not_timed"]["saelab"]
    assert next(row for row in rows if row["op"] == "pairs_by_feature")["contenders"]
    printed = [line for line in capsys.readouterr().out.splitlines() if "sparse_decode" in line]
    assert any("no speed: wrong" in line for line in printed)
    assert not any(" ms" in line for line in printed if " forward  " in line)


def test_a_result_that_breaks_gets_no_time_and_the_others_go_on(smoke, monkeypatch):
    from saelab_kernels.pairs import cpu

    def broken(*_):
        raise RuntimeError("a launch failed\nand here is why, over many lines")

    monkeypatch.setattr(cpu, "sort_pairs", broken)
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    status, rows = smoke("ops", "--ops", "pairs_by_feature,sampled_dot")
    assert status == REFUSED
    assert rows[0]["not_timed"] == {"saelab": "RuntimeError: a launch failed"}
    assert rows[1]["contenders"]


def test_a_training_step_that_differs_from_the_dense_one_is_not_timed(smoke, monkeypatch):
    right = ours.Kernels.step
    monkeypatch.setattr(ours.Kernels, "step", lambda self, x: right(self, x * 1.5))
    status, rows = smoke("train", "--only", "none")
    assert status == 0
    assert list(rows[0]["contenders"]) == ["saelab"]
    assert "after one step" in rows[0]["not_timed"]["saelab_kernels"]


def test_without_one_right_training_step_nothing_is_timed(smoke, monkeypatch, capsys):
    for contender in (ours.Kernels, ours.Loop):
        monkeypatch.setattr(contender, "step", lambda self, x: None)
    status, rows = smoke("train", "--only", "none")
    assert (status, rows) == (REFUSED, None)
    assert "none of our steps may be timed" in capsys.readouterr().err


def test_a_search_that_depends_on_its_chunks_is_not_timed(smoke, monkeypatch, capsys):
    from saelab_kernels.search.stream import FeatureSearch

    right = FeatureSearch.add
    monkeypatch.setattr(FeatureSearch, "add", lambda self, *firings: right(self, *(part[1:] for part in firings)))
    assert smoke("search") == (REFUSED, None)
    assert "depend on the chunks" in capsys.readouterr().err


def test_a_search_that_finds_too_little_is_not_timed(smoke, monkeypatch, capsys):
    right = bench_search.firings

    def half(encoder, x):
        features, tokens, values = right(encoder, x)
        return features, tokens, values / 2

    monkeypatch.setattr(bench_search, "firings", half)
    assert smoke("search") == (REFUSED, None)
    assert "top activations are off by 5.0e-01" in capsys.readouterr().err


@pytest.mark.parametrize("topic", ["ops", "train", "search", "quality"])
def test_interpreted_kernels_are_never_timed(topic, smoke, monkeypatch, capsys):
    from saelab_kernels import compiled

    monkeypatch.setattr(compiled, "INTERPRETED", True)
    assert smoke(topic) == (REFUSED, None)
    assert "TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["ops", "--device", "cuda", "--smoke", "--out", str(tmp_path)]) == REFUSED
    assert "no CUDA device" in capsys.readouterr().err


def test_no_operation_is_begun_when_time_is_up(smoke):
    status, rows = smoke("ops", "--ops", "encode_topk", "--time-limit", "1e-9")
    assert status == 0
    assert rows[0]["not_timed"] == {"saelab": bench_ops.OUT_OF_TIME}
