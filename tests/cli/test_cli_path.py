"""The whole path on the tiny model, verb by verb, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import saelab

import saelab as sl


def test_every_stage_is_finished_and_says_what_it_was_made_from(workspace: Path):
    stages = json.loads(saelab("show", workspace, "--json").out)
    assert {stage["stage"]: stage["state"] for stage in stages} == {
        "activations": "finished",
        "sae": "finished",
        "eval": "finished",
        "index": "finished",
    }
    by_stage = {stage["stage"]: stage for stage in stages}
    assert by_stage["sae"]["parents"] == {"activations": "../activations"}
    assert by_stage["sae"]["config"]["sae"] == {
        "arch": "topk",
        "d_sae": 128,
        "k": 4,
        **{k: v for k, v in by_stage["sae"]["config"]["sae"].items() if k not in ("arch", "d_sae", "k")},
    }
    assert by_stage["sae"]["last_metrics"]["tokens"] == 40_000
    assert "finished" in saelab("show", workspace / "sae").out


def test_eval_prints_every_metric_with_its_interval_and_token_count(workspace: Path, tmp_path: Path):
    result = json.loads(saelab("eval", workspace, "--json", "--set", "draws=50", "--out", tmp_path / "eval").out)
    names = {"l0", "explained_variance", "ce_recovered", "kl_recovered", "dead_fraction", "density"}
    assert names <= set(result["metrics"])
    assert all({"value", "low", "high", "n_tokens"} == set(part) for part in result["metrics"].values())
    assert result["metrics"]["l0"]["value"] <= 4
    assert "held-out tokens" in saelab("eval", workspace, "--set", "draws=50", "--out", tmp_path / "eval").out


def test_evaluating_again_replaces_the_older_result(workspace: Path, tmp_path: Path):
    for tokens in (200, 400):
        result = saelab("eval", workspace, "--tokens", tokens, "--set", "draws=20", "--out", tmp_path / "eval")
        assert result.code == 0, result.err
    assert json.loads((tmp_path / "eval" / "run.json").read_text())["config"]["tokens"] == 400


def test_features_are_found_by_text_label_token_density_and_number(workspace: Path):
    hits = json.loads(saelab("features", workspace, "--text", "The old clock counts seven feet", "--json").out)
    assert hits
    assert hits == sorted(hits, key=lambda hit: -hit["score"])
    number = hits[0]["feature"]
    record = json.loads(saelab("features", workspace, number, "--json").out)
    assert record["index"] == number
    assert record["top_examples"]
    assert f"feature {number}:" in saelab("features", workspace, number).out
    for arguments in (("--token", "e"), ("--density", "0.0001:0.5"), ("--label", "the clock")):
        assert saelab("features", workspace, *arguments).code == 0


def test_a_feature_is_steered_from_the_command_line(workspace: Path):
    texts = json.loads(
        saelab(
            "steer", workspace, "--feature", 3, "--prompt", "The old", "--strength", 6, "--max-new-tokens", 8, "--json"
        ).out
    )
    assert texts["steered"] != texts["unsteered"]
    for arguments in (("--mode", "ablate"), ("--mode", "clamp", "--value", 2), ("--feature", 4, "--chat")):
        result = saelab("steer", workspace, "--feature", 3, "--max-new-tokens", 2, *arguments)
        assert result.code == 0, result.err
        assert "unsteered:" in result.out


def test_ten_lines_of_python_do_the_same(workspace: Path, tiny_model_dir: Path):
    model = sl.load_model(str(tiny_model_dir))
    sae = sl.load_sae(workspace)
    index = sl.load_index(workspace)
    feature = int(index.column("density").argmax())
    assert index.feature(feature).top_examples
    with sl.steer(model, sae.feature(feature), strength=0.6):
        assert isinstance(model.generate("The old clock", max_new_tokens=3), str)


@pytest.mark.parametrize("arch", ["relu", "batchtopk"])
def test_other_architectures_train_from_the_same_activations(workspace: Path, tmp_path: Path, arch: str):
    result = saelab(
        "train",
        workspace,
        "--arch",
        arch,
        "--expansion",
        2,
        "--tokens",
        4_000,
        "--set",
        "batch_size=500",
        "--out",
        tmp_path / "sae",
        "--json",
    )
    assert result.code == 0, result.err
    assert json.loads(result.out)["tokens"] == 4_000
    assert sl.load_sae(tmp_path / "sae").cfg.d_sae == 64


def test_a_printed_config_trains_the_same(workspace: Path, tmp_path: Path):
    printed = saelab(
        "train", workspace, "--k", 3, "--expansion", 2, "--tokens", 2_000, "--set", "batch_size=500", "--print-config"
    ).out
    file = tmp_path / "train.toml"
    file.write_text(printed)
    assert "# Features kept for each token" in printed
    for out, arguments in (
        ("a", ("--config", file)),
        ("b", ("--k", 3, "--expansion", 2, "--tokens", 2_000, "--set", "batch_size=500")),
    ):
        result = saelab("train", workspace, *arguments, "--out", tmp_path / out)
        assert result.code == 0, result.err
    assert (tmp_path / "a" / "sae_weights.safetensors").read_bytes() == (
        tmp_path / "b" / "sae_weights.safetensors"
    ).read_bytes()


def test_the_settings_of_a_run_are_a_config_that_repeats_it(workspace: Path, tmp_path: Path):
    file = tmp_path / "again.json"
    file.write_text(json.dumps(json.loads((workspace / "sae" / "run.json").read_text())["config"]))
    result = saelab("train", workspace, "--config", file, "--out", tmp_path / "sae")
    assert result.code == 0, result.err
    weights = [(path / "sae_weights.safetensors").read_bytes() for path in (workspace / "sae", tmp_path / "sae")]
    assert weights[0] == weights[1]


def test_training_while_the_model_runs_needs_no_disk_for_activations(
    tiny_model_dir: Path, text_file: Path, tmp_path: Path
):
    result = saelab(
        "train",
        "--live",
        "--model",
        tiny_model_dir,
        "--text",
        text_file,
        "--hook",
        "blocks.1.hook_resid_post",
        "--d-sae",
        64,
        "--k",
        4,
        "--tokens",
        4_000,
        "--set",
        "batch_size=500",
        "--set",
        "live.context=32",
        "--out",
        tmp_path / "sae",
    )
    assert result.code == 0, result.err
    sae = sl.load_sae(tmp_path / "sae")
    assert sae.metadata.hook_name == "blocks.1.hook_resid_post"
    assert sae.metadata.mean_norm > 0
