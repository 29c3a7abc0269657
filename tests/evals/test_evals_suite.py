"""The suites from the command line: what they write, say when a piece cannot run, and leave when interrupted."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import pytest

from saelab.config import from_mapping
from saelab.evals.suite import SuiteConfig

WORDS = ["river", "city", "music", "light", "water", "house", "island", "language", "book", "world", "king", "tower"]
HOOK = "blocks.1.hook_resid_post"
FEW = (
    "--set",
    "draws=30",
    "--set",
    "controls.tokens=3000",
    "--set",
    "controls.training_tokens=4000",
    "--set",
    "meta.steps=5",
    "--set",
    "meta.k=1",
    "--set",
    "absorption.min_letters=1",
    "--set",
    "absorption.min_words=4",
    "--set",
    "absorption.min_f1=0.01",
    "--set",
    "absorption.examples=1",
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


def saelab(*arguments: object) -> Result:
    from saelab.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["saelab", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            return Result(stop.code if isinstance(stop.code, int) else 1, out.getvalue(), err.getvalue())
    return Result(0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def workspace(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of the tiny model, and the same SAE trained with two seeds."""
    path = tmp_path_factory.mktemp("evals") / "tiny"
    text = path.with_name("text.jsonl")
    stories = [
        " ".join(f"the {WORDS[(i * d + i) % 12]} of the {WORDS[(i + d) % 12]}" for i in range(30)) for d in range(40)
    ]
    text.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories), "utf-8")
    arguments = [
        (
            "cache",
            "--model",
            tiny_model_dir,
            "--text",
            text,
            "--hook",
            HOOK,
            "--tokens",
            8000,
            "--set",
            "context=32",
            "--set",
            "held_out=0.25",
            "--out",
            path / "activations",
        ),
    ]
    for seed, out in ((0, "sae"), (1, "other/sae")):
        arguments.append(
            (
                "train",
                path / "activations",
                "--k",
                4,
                "--expansion",
                2,
                "--tokens",
                6000,
                "--set",
                "batch_size=300",
                "--seed",
                seed,
                "--out",
                path / out,
            )
        )
    for call in arguments:
        result = saelab(*call)
        assert result.code == 0, result.err
    return path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probes") / "places.jsonl"
    lines = [{"text": f"the long {'river' if i % 2 else 'city'} of {i} south", "label": i % 2} for i in range(24)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def full(workspace: Path, places: Path) -> dict:
    result = saelab(
        "eval",
        workspace / "sae",
        "--suite",
        "full",
        "--against",
        workspace / "other",
        "--probe-data",
        places,
        *FEW,
        "--out",
        workspace / "eval",
        "--json",
    )
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_the_core_fields_stay_what_they_were(full: dict):
    assert {"metrics", "n_tokens", "n_sequences", "n_outliers", "log10_density"} <= set(full)
    assert {"value", "low", "high", "n_tokens"} == set(full["metrics"]["l0"])


def test_every_number_of_interpretability_stands_beside_random_weights(full: dict):
    pieces = {piece["name"]: piece for piece in full["pieces"]}
    assert list(pieces) == ["baselines", "controls", "probing", "absorption", "stability", "meta"]
    for name, piece in pieces.items():
        assert piece["skipped"] is None, piece
        assert piece["scores"], name
        if name not in ("baselines", "controls"):
            assert all(score["control"] is not None for score in piece["scores"]) or name == "absorption", piece
    labels = {score["label"] for score in pieces["controls"]["scores"]}
    assert labels == {"random weights", "shuffled"}
    assert "4,000 training tokens" in pieces["controls"]["notes"][0] or "3,900" in pieces["controls"]["notes"][0]


def test_another_sae_is_compared_over_the_same_text(full: dict):
    verdicts = {entry["metric"]: entry for entry in full["differences"]}
    assert verdicts["l0"]["verdict"] == "not distinguishable"
    assert "ce_clean" not in verdicts
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in verdicts.values())


def test_the_report_is_a_page_that_needs_no_other(workspace: Path, full: dict):
    html, markdown = ((workspace / "eval" / f"report.{kind}").read_text() for kind in ("html", "md"))
    for text in (html, markdown):
        assert all(title in text for title in ("Sparse probing", "Stability across seeds", "random weights"))
    assert html.count("<svg") >= 6
    assert "http" not in html
    assert "<script" not in html
    parents = json.loads((workspace / "eval" / "parents.json").read_text())
    assert set(parents) == {"sae", "activations", "against_1"}
    assert not list(workspace.glob("eval.part*"))


def test_controls_are_trained_once(workspace: Path, full: dict):
    controls = sorted((workspace / "controls").iterdir())
    assert len(controls) == 3  # random weights with two seeds, and shuffled
    before = [(path / "sae_weights.safetensors").stat().st_mtime_ns for path in controls]
    result = saelab("eval", workspace / "sae", "--suite", "full", *FEW, "--out", workspace / "again", "--json")
    assert result.code == 0, result.err
    assert [(path / "sae_weights.safetensors").stat().st_mtime_ns for path in controls] == before
    skipped = {piece["name"]: piece["skipped"] for piece in json.loads(result.out)["pieces"]}
    assert "--probe-data FILE" in skipped["probing"]
    assert "--seed 1" in skipped["stability"]
    assert "Not run: no labelled texts" in (workspace / "again" / "report.md").read_text()


def test_an_interrupted_evaluation_keeps_what_it_had_finished(
    workspace: Path, full: dict, monkeypatch: pytest.MonkeyPatch
):
    def stop(*arguments: object, **more: object) -> None:
        raise KeyboardInterrupt

    call = ("eval", workspace / "sae", "--suite", "full", *FEW, "--out", workspace / "broken", "--json")
    with monkeypatch.context() as patch:
        patch.setattr("saelab.evals.suite.meta_structure", stop)
        assert saelab(*call).code == 130
    kept = list(workspace.glob("broken.part-resumable/*.json"))
    assert {file.name.split("-")[0] for file in kept} == {
        "core",
        "baselines",
        "controls",
        "probing",
        "absorption",
        "stability",
    }
    with monkeypatch.context() as patch:
        patch.setattr("saelab.evals.reconstruction.evaluate", stop)
        result = saelab(*call)
    assert result.code == 0, result.err
    assert not list(workspace.glob("broken.part*"))
    again = json.loads((workspace / "again" / "eval.json").read_text()) if (workspace / "again").exists() else None
    if again is not None:
        assert json.loads(result.out)["metrics"] == again["metrics"]


def test_an_sae_that_does_not_say_how_it_was_trained_has_no_control(workspace: Path, tmp_path: Path):
    import shutil

    shutil.copytree(workspace / "sae", tmp_path / "sae")
    for name in ("run.json", "parents.json", "DONE"):
        (tmp_path / "sae" / name).unlink()
    result = saelab(
        "eval", tmp_path / "sae", "--activations", workspace / "activations", "--suite", "full", *FEW, "--json"
    )
    assert result.code == 0, result.err
    pieces = {piece["name"]: piece for piece in json.loads(result.out)["pieces"]}
    assert "does not say how it was trained" in pieces["controls"]["skipped"]
    assert "No number of the control" in pieces["meta"]["notes"][-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--suite", "half"), "--suite must be one of core, full, toy, got 'half'"),
        (("--arch", "topk"), "--arch topk belongs to --suite toy"),
        ((), "eval needs the directory of an SAE"),
        (("--suite", "toy", "--probe-data", "x.csv"), "leave --probe-data out"),
        (("--suite", "toy", "--arch", "topkk"), "did you mean topk"),
        (("--set", "probing.text=3"), "probing.text is not a setting of ProbingConfig"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: tuple[str, ...], sentence: str):
    result = saelab("eval", *arguments)
    assert result.code == 2
    assert sentence in result.err


def test_a_missing_probe_file_is_one_sentence(workspace: Path):
    result = saelab(
        "eval", workspace / "sae", "--suite", "full", "--probe-data", "gone.csv", *FEW, "--out", workspace / "x"
    )
    assert result.code == 2
    assert "there is no file gone.csv" in result.err


def test_printed_settings_read_back(tmp_path: Path):
    import tomllib

    printed = saelab("eval", "--print-config", "--suite", "full").out
    assert from_mapping(SuiteConfig, tomllib.loads(printed)) == SuiteConfig(suite="full")


def test_toy_worlds_from_the_command_line(tmp_path: Path):
    result = saelab(
        "eval",
        "--suite",
        "toy",
        "--arch",
        "topk",
        "--arch",
        "batchtopk",
        "--tokens",
        2048,
        "--set",
        "seeds=[0]",
        "--set",
        "world.n_features=16",
        "--set",
        "world.d=8",
        "--set",
        "world.l0=1.5",
        "--set",
        "d_sae=16",
        "--set",
        "world.batch_size=256",
        "--out",
        tmp_path / "toy",
    )
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 1 + 4 * 2
    assert lines[0].split()[:2] == ["world", "arch"]
    content = json.loads((tmp_path / "toy" / "eval.json").read_text())
    assert len(content["results"]) == 8
    assert "Architectures on known features" in (tmp_path / "toy" / "report.html").read_text()
