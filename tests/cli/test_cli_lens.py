from __future__ import annotations

import json
import shutil

import pytest
from commandline import saelab


@pytest.fixture(scope="module")
def tuned(tiny_model_dir, text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("lens") / "lens"
    result = saelab(
        *("lens", "--train-tuned", "--model", tiny_model_dir, "--tokens", 600, "--out", path, "--json"),
        *("--set", f"text.source={text_file}", "--set", "context=32", "--set", "held_out=0.25"),
        *("--set", "held_out_tokens=300", "--set", "checkpoint_every=4"),
    )
    assert result.code == 0, result.err
    return path, json.loads(result.out)


def test_training_a_tuned_lens_reports_every_layer_beside_the_logit_lens(tuned):
    path, result = tuned
    assert (path / "DONE").exists()
    assert [layer["hook_name"] for layer in result["layers"]][:2] == [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_post",
    ]
    assert all(layer["tuned_kl"]["value"] < layer["logit_kl"]["value"] for layer in result["layers"][:-1])
    assert result["n_held_out_tokens"] > 0
    assert result["n_training_tokens"] >= 600


def test_a_text_is_read_layer_by_layer(tiny_model_dir, tmp_path):
    picture = tmp_path / "lens.svg"
    result = saelab("lens", "the river and the", "--model", tiny_model_dir, "--out", picture)
    assert result.code == 0, result.err
    assert result.out.startswith("logit lens, after ' the' (7 tokens")
    assert "2.hook_resid_post" in result.out
    assert picture.read_text().startswith("<svg")


def test_a_tuned_lens_reads_nearer_to_the_model(tiny_model_dir, tuned):
    plain, better = (
        json.loads(saelab("lens", "the winter sea", "--model", tiny_model_dir, "--json", *more).out)
        for more in ((), ("--tuned", tuned[0]))
    )
    assert (plain["kind"], better["kind"]) == ("logit lens", "tuned lens")
    assert better["cells"][0][-1]["kl"] < plain["cells"][0][-1]["kl"]
    assert better["cells"][-1][-1]["kl"] == pytest.approx(0, abs=1e-5)


def test_a_logit_is_divided(workspace):
    """With the workspace's SAE, whose model is found by itself."""
    result = saelab("lens", "the river and the", "--logit", "--sae", workspace, "--heads", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert sum(part["value"] for part in found["parts"]) == pytest.approx(found["logit"], abs=1e-6)
    assert {"head", "mlp", "feature", "error"} <= {part["kind"] for part in found["parts"]}
    shown = saelab("lens", "the river and the", "--logit", "--sae", workspace, "--answer", " sea", "--wrong", " river")
    assert "logit of ' sea' minus ' river' after ' the'" in shown.out
    assert "the last norm is frozen" in shown.out


def test_features_are_read(workspace):
    result = saelab("lens", "--sae", workspace, "--feature", 3, "--feature", 5, "--top", 4, "--json")
    assert result.code == 0, result.err
    first, second = json.loads(result.out)
    assert (first["feature"], second["feature"]) == (3, 5)
    assert len(first["promoted"]) == len(first["suppressed"]) == 4
    assert "99 % of random directions" in saelab("lens", "--sae", workspace, "--feature", 3).out


def test_settings_can_be_printed():
    result = saelab("lens", "--train-tuned", "--print-config", "--tokens", 77)
    assert result.code == 0
    assert "tokens = 77" in result.out


def test_a_finished_tuned_lens_is_not_resumed(tuned):
    result = saelab("lens", "--resume", tuned[0])
    assert result.code == 2
    assert "nothing to resume" in result.err


def test_an_interrupted_training_is_resumed_with_its_own_settings(tuned, tmp_path):
    """A kill after the step-4 checkpoint: what came later is gone."""
    path = tmp_path / "lens"
    shutil.copytree(tuned[0], path)
    for name in ("DONE", "lens.json", "lens.safetensors"):
        (path / name).unlink()
    last = sorted((path / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)
    result = saelab("lens", "--resume", path)
    assert result.code == 0, result.err
    assert "A lens that reads nothing" in result.out
    assert (path / "lens.safetensors").read_bytes() == (tuned[0] / "lens.safetensors").read_bytes()
    assert (path / "lens.json").read_bytes() == (tuned[0] / "lens.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "lens needs a text to read"),
        (["a", "--feature", "1"], "and not both"),
        (["--feature", "1"], "--sae goes with --feature"),
        (["a", "--answer", " b"], "belong to --logit"),
        (["a", "--tokens", "5"], "belong to --train-tuned"),
        (["a", "--out", "x.jpg"], "end it in .png"),
        (["a", "--logit", "--out", "x.png"], "--out draws the heat map"),
        (["a", "--logit", "--tuned", "x"], "without features or a tuned lens"),
        (["a", "--train-tuned"], "reads a text, not 'a'"),
        (["--train-tuned"], "needs a directory to write"),
        (["--resume", "x", "--tokens", "4"], "goes on with the settings"),
        (["--train-tuned", "--set", "lrr=1"], "did you mean lr"),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(arguments, sentence):
    result = saelab("lens", *arguments)
    assert result.code == 2
    assert sentence in result.err
    assert "Traceback" not in result.err
