"""saelab doctor and saelab plan: exit codes, tables, JSON and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commandline import saelab


@pytest.fixture(scope="module")
def asked(workspace: Path, text_file: Path) -> list:
    return ["doctor", workspace, "--text", text_file, "--tokens", 1024]


def test_a_fitting_sae_gives_exit_code_0_and_a_table(asked: list):
    result = saelab(*asked)
    assert result.code == 0, (result.out, result.err)
    assert "explained variance" in result.out
    assert "other readings, best first" in result.out
    assert result.out.strip().splitlines()[-1].startswith("fits")


def test_an_sae_at_another_hook_gives_exit_code_1_and_json(asked: list):
    result = saelab(*asked, "--hook", "blocks.1.hook_mlp_out", "--json")
    assert result.code == 1, (result.out, result.err)
    content = json.loads(result.out)
    assert (content["verdict"], content["fits"]) == ("does not fit", False)
    assert content["measured"]["where"]["reads"] == "blocks.1.hook_mlp_out"
    assert content["measured"]["trials"][0]["ratio"] >= content["measured"]["trials"][1]["ratio"]


def test_an_sae_without_a_hook_or_model_is_asked_for_them(workspace: Path, asked: list, tiny_model_dir, tmp_path: Path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(workspace / "sae" / "sae_weights.safetensors", foreign)
    settings = json.loads((workspace / "sae" / "cfg.json").read_text())
    settings["metadata"] = {"sae_lens_version": "6.54.12"}
    (foreign / "cfg.json").write_text(json.dumps(settings))
    result = saelab("doctor", foreign, *asked[2:])
    assert result.code == 2
    assert "give one with --model" in result.err
    result = saelab("doctor", foreign, *asked[2:], "--model", tiny_model_dir)
    assert result.code == 2
    assert "give one with --hook" in result.err
    at_hook = ["--model", tiny_model_dir, "--hook", "blocks.1.hook_resid_post"]
    assert saelab("doctor", foreign, *asked[2:], *at_hook).code == 0


def test_what_cannot_be_examined_is_refused_in_a_sentence(asked: list, tmp_path: Path):
    for arguments, words in (
        ([*asked, "--hook", "blocks.1.hook_resid_pots"], "blocks.1.hook_resid_post"),
        ([*asked[:4], "--tokens", 5], "at least two rows"),
        (["doctor", tmp_path / "nothing"], "nothing"),
    ):
        result = saelab(*arguments)
        assert result.code == 2, result
        assert words in result.err
        assert "Traceback" not in result.err


def test_a_plan_for_activations_that_are_there(workspace: Path):
    shape = ["--k", 4, "--expansion", 4, "--tokens", 40_000, "--set", "batch_size=500", "--json"]
    result = saelab("plan", workspace, *shape)
    assert result.code == 0, result.err
    (plan,) = json.loads(result.out)["plans"]
    assert (plan["n_tokens"], plan["n_steps"]) == (40_000, 80)
    assert plan["memory_bytes"] == sum(plan["memory"].values())
    assert plan["seconds"]["low"] <= plan["seconds"]["median"] <= plan["seconds"]["high"]
    # the same training was done for the workspace, with checkpoints
    checkpoints = ["--set", "checkpoint_every=20"]
    result = saelab("plan", workspace, *shape, *checkpoints)
    (plan,) = json.loads(result.out)["plans"]
    written = sum(file.stat().st_size for file in (workspace / "sae").rglob("*") if file.is_file())
    assert plan["disk_bytes"] == pytest.approx(written, rel=0.2)


def test_a_plan_for_a_capture_and_a_training(workspace: Path, tiny_model_dir: Path, text_file: Path):
    capture = ["--model", tiny_model_dir, "--text", text_file, "--hook", "blocks.1.hook_resid_post"]
    capture += ["--set", "live.context=64", "--set", "live.held_out=0.25"]
    result = saelab("plan", *capture, "--tokens", 20_480, "--k", 4, "--set", "batch_size=500", "--json")
    assert result.code == 0, result.err
    first, second = json.loads(result.out)["plans"]
    written = sum(file.stat().st_size for file in (workspace / "activations").rglob("*") if file.is_file())
    assert first["disk_bytes"] == pytest.approx(written, rel=0.2)
    assert second["n_steps"] == 40
    assert any("int8" in other["change"] for other in first["cheaper"])
    result = saelab("plan", *capture, "--tokens", 20_480, "--k", 4, "--set", "batch_size=500", "--live")
    assert result.code == 0, result.err
    assert "chunk of live activations" in result.out
    assert "cheaper: " in result.out


def test_plans_that_cannot_be_made(workspace: Path):
    for arguments, words in (
        (["plan"], "give a directory, or --model and --hook"),
        (["plan", workspace, "--model", "demo"], "leave out --model"),
        (["plan", workspace, "--k", 500, "--expansion", 2], "k must be between 1 and d_sae"),
        (["plan", workspace, "--d-sae", 10**10], "of memory, but the machine has"),
    ):
        result = saelab(*arguments)
        assert result.code == 2, result
        assert words in result.err
