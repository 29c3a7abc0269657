"""saelab train: many SAEs from one file, and SAEs of several hooks or stores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commandline import saelab

import saelab as sl
from saelab import atomic

GRID = """
tokens = 4_000
batch_size = 500
checkpoint_every = 3

[[grid]]
expansion = [1, 2]
sae = { arch = "topk", k = [2, 4] }

[[grid]]
expansion = 2
seed = [0, 1]
sae = { arch = "batchtopk", k = 4 }
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(GRID)
    return path


def test_one_file_trains_many_saes_each_as_if_alone(workspace: Path, tmp_path: Path, grid: Path):
    out = tmp_path / "sweep"
    result = saelab("train", workspace, "--sweep", grid, "--out", out)
    assert result.code == 0, result.err
    assert "6 SAEs (topk, batchtopk)" in result.err
    assert "gamma" in result.err
    table = result.out.splitlines()
    assert table[0].split() == ["SAE", "d_sae", "l0", "reconstruction", "loss", "n_dead", "decoder_projection"]
    names = ["topk-d_sae32-k2", "topk-d_sae32-k4", "topk-d_sae64-k2", "topk-d_sae64-k4", "batchtopk-seed0"]
    assert [line.split()[0] for line in table[1:]] == [*names, "batchtopk-seed1"]
    assert sl.load_sae(out / "topk-d_sae64-k2").d_sae == 64
    alone = saelab(
        "train", workspace, "--k", 2, "--d-sae", 64, "--tokens", 4_000, "--set", "batch_size=500",
        "--set", "checkpoint_every=3", "--out", tmp_path / "alone",
    )  # fmt: skip
    assert alone.code == 0, alone.err
    for name in ("sae_weights.safetensors", "cfg.json", "sparsity.safetensors"):
        assert atomic.sha256(out / "topk-d_sae64-k2" / name) == atomic.sha256(tmp_path / "alone" / name)
    assert "[sweep]  finished" in saelab("show", out).out


def test_a_sweep_is_resumed_by_its_directory_and_gives_json(workspace: Path, tmp_path: Path, grid: Path):
    out = tmp_path / "sweep"
    assert saelab("train", workspace, "--sweep", grid, "--out", out).code == 0
    whole = atomic.sha256(out / "batchtopk-seed1" / "sae_weights.safetensors")
    (out / "DONE").unlink()  # as if killed with a member half done and one not begun
    shutil.rmtree(out / "batchtopk-seed1")
    for name in ("DONE", "cfg.json", "sae_weights.safetensors"):
        (out / "topk-d_sae32-k4" / name).unlink()
    assert f"saelab train --resume {out}" in saelab("show", out).out
    asked = saelab("train", "--resume", out, "--tokens", 8_000)
    assert asked.code == 2
    assert "tokens = 8000 is asked for now" in asked.err
    result = saelab("train", "--resume", out, "--json")
    assert result.code == 0, result.err
    members = json.loads(result.out)["members"]
    assert {member["state"] for member in members} == {"finished"}
    assert all(member["decoder_projection"] is not None for member in members)
    assert atomic.sha256(out / "batchtopk-seed1" / "sae_weights.safetensors") == whole
    assert "there is nothing to resume" in saelab("train", "--resume", out).err


def test_a_failed_member_is_in_the_exit_code_and_the_others_are_finished(workspace: Path, tmp_path: Path):
    file = tmp_path / "wild.toml"
    file.write_text(
        "tokens = 4_000\nbatch_size = 500\n"
        "[[grid]]\nexpansion = 1\nsae = { arch = 'relu', l1_coefficient = [0.1, 1e38] }\n"
    )
    result = saelab("train", workspace, "--sweep", file, "--out", tmp_path / "sweep")
    assert result.code == 2
    assert "1 of 2 SAEs" in result.err
    assert "(relu-l1_coefficient1e+38)" in result.err
    assert "the gradient is not finite at step 1" in result.err
    assert sl.load_sae(tmp_path / "sweep" / "relu-l1_coefficient0.1").d_sae == 32


def test_an_eval_block_measures_every_member_on_the_same_held_out_text(workspace: Path, tmp_path: Path, grid: Path):
    grid.write_text(GRID + "\n[eval]\ntokens = 200\ndraws = 50\n")
    out = tmp_path / "sweep"
    result = saelab("train", workspace, "--sweep", grid, "--out", out, "--json")
    assert result.code == 0, result.err
    members = {member["name"]: member for member in json.loads(result.out)["members"]}
    assert len(members) == 6
    alone = saelab(
        "eval", out / "topk-d_sae64-k2", "--tokens", 200, "--set", "draws=50", "--json", "--out", tmp_path / "e"
    )
    assert alone.code == 0, alone.err
    assert members["topk-d_sae64-k2"]["metrics"] == json.loads(alone.out)["metrics"]
    assert "explained_variance" in (out / "eval" / "report.md").read_text()
    again = saelab("eval", out, "--tokens", 200, "--set", "draws=50")
    assert again.code == 0, again.err
    assert [line.split()[0] for line in again.out.splitlines()[1:7]] == sorted(members)
    assert "[members]  finished" in saelab("show", out / "eval").out


def test_a_sweep_has_no_full_suite(workspace: Path, tmp_path: Path, grid: Path):
    out = tmp_path / "sweep"
    assert saelab("train", workspace, "--sweep", grid, "--out", out).code == 0
    refused = saelab("eval", out, "--suite", "full")
    assert refused.code == 2
    assert "name a member" in refused.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--k", "3"), "sae.k is set on the command line and by a [[grid]] block"),
        (("--live",), "leave out --config, --live and --print-config"),
        (("--expansion", "2"), "expansion is set on the command line and by a [[grid]] block"),
    ],
)
def test_what_does_not_go_with_a_sweep_is_refused(
    workspace: Path, grid: Path, arguments: tuple[str, ...], sentence: str
):
    result = saelab("train", workspace, "--sweep", grid, *arguments)
    assert (result.code, result.out) == (2, "")
    assert sentence in result.err


def test_a_sweep_needs_activations_and_a_file(workspace: Path, tmp_path: Path, grid: Path):
    assert "a sweep needs activations" in saelab("train", "--sweep", grid).err
    assert "there is no config file" in saelab("train", workspace, "--sweep", tmp_path / "none.toml").err


@pytest.fixture(scope="module")
def two_hooks(tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "activations"
    result = saelab(
        "cache", "--model", tiny_model_dir, "--text", text_file, "--hook", "blocks.0.hook_resid_post",
        "--hook", "blocks.1.hook_resid_post", "--tokens", 10_240, "--set", "context=64", "--set", "held_out=0.25",
        "--out", out,
    )  # fmt: skip
    assert result.code == 0, result.err
    return out


SMALL = ("--d-sae", 64, "--tokens", 4_000, "--set", "batch_size=500")


@pytest.mark.parametrize("arch", ["transcoder", "crosscoder"])
def test_hooks_given_twice_are_the_slots_of_a_token(two_hooks: Path, tmp_path: Path, arch: str):
    hooks = ("--hook", "blocks.0.hook_resid_post", "--hook", "blocks.1.hook_resid_post")
    result = saelab("train", two_hooks, "--arch", arch, *hooks, "--k", 4, *SMALL, "--out", tmp_path / "sae")
    assert result.code == 0, result.err
    sae = sl.load_sae(tmp_path / "sae")
    assert (sae.n_slots, sae.metadata.hook_name) == (2, "blocks.0.hook_resid_post")


def test_a_second_store_is_stacked_or_subtracted(two_hooks: Path, tmp_path: Path):
    hook = ("--hook", "blocks.1.hook_resid_post")
    second = shutil.copytree(two_hooks, tmp_path / "second")
    both = saelab(
        "train",
        two_hooks,
        "--with",
        second,
        *hook,
        "--arch",
        "crosscoder",
        "--k",
        4,
        *SMALL,
        "--out",
        tmp_path / "cross",
    )
    assert both.code == 0, both.err
    assert sl.load_sae(tmp_path / "cross").n_slots == 2
    same = saelab("train", two_hooks, "--minus", second, *hook, *SMALL, "--out", tmp_path / "minus")
    assert same.code == 2  # a store minus itself is zero
    assert "there is nothing to learn" in same.err
    neither = saelab("train", two_hooks, "--minus", second, "--with", second, *hook)
    assert "give one of them" in neither.err
    assert "give --hook once" in saelab("train", two_hooks, "--with", second, *hook, *hook, *SMALL).err
