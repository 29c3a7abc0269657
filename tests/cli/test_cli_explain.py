"""The verb explain and what features gained, on the tiny workspace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commandline import saelab

SMALL = (
    "--tokens", 8000, "--set", "controls.tokens=4000", "--set", "controls.training_tokens=8000", "--set", "draws=100",
    "--set", "scores.features=2", "--set", "scores.least=3", "--set", "scores.texts=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def copied(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of its own, because a control is kept beside the SAE."""
    place = tmp_path_factory.mktemp("explained") / "tiny"
    shutil.copytree(workspace, place)
    return place


@pytest.fixture(scope="module")
def report(copied: Path) -> Path:
    out = copied / "explain"
    result = saelab("explain", copied, "--report", out, *SMALL)
    assert result.code == 0, result.err
    assert "HELD-OUT PRECISION AND RECALL" in result.out
    return out


def test_a_report_holds_both_sides_their_features_and_something_to_read(report: Path):
    result = json.loads((report / "explain.json").read_text())
    assert set(result["sides"]) == {"SAE", "random weights"}
    for name in ("precision", "recall", "f1"):
        (row,) = [c for c in result["comparisons"] if c["measure"] == name and c["least"] == 1]
        assert row["difference"]["low"] <= row["difference"]["value"] <= row["difference"]["high"]
        assert row["n"] == result["sides"]["SAE"]["n_scorable"] > 0
    assert sum(result["about"]["tokens"]) >= 7000
    for side in ("SAE", "random_weights"):
        lines = (report / f"{side}.jsonl").read_text().splitlines()
        assert len(lines) == result["sides"][side.replace("_", " ")]["n_clear"]
    assert "random weights" in (report / "report.md").read_text()
    assert "<svg" in (report / "report.html").read_text()
    assert not list(report.parent.glob("explain.part*"))
    assert saelab("show", report).code == 0


def test_a_report_that_was_stopped_goes_on_to_the_same_numbers(report: Path, copied: Path, monkeypatch):
    from saelab.features import explain_run

    calls = {"n": 0}
    plain = explain_run.explain_block

    def stopping(*arguments):
        calls["n"] += 1
        if calls["n"] == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    out = copied.parent / "again"
    monkeypatch.setattr(explain_run, "BLOCK", 32)
    monkeypatch.setattr(explain_run, "explain_block", stopping)
    assert saelab("explain", copied, "--report", out, *SMALL).code != 0
    assert not (out / "explain.json").exists()
    assert list(out.parent.glob("again.part-resumable/*.json"))
    first = calls["n"]
    assert saelab("explain", copied, "--report", out, *SMALL, "--json").code == 0
    assert calls["n"] > first
    before, after = (json.loads((place / "explain.json").read_text()) for place in (report, out))
    assert before == after


def test_one_feature_is_explained_by_every_explainer(copied: Path, report: Path):
    lines = (report / "SAE.jsonl").read_text().splitlines()
    feature = max(map(json.loads, lines), key=lambda each: sum(each["n_clear"]))
    result = saelab("explain", copied, feature["feature"], "--tokens", 8000, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out) == feature
    shown = saelab("explain", copied, feature["feature"], "--tokens", 8000)
    assert shown.code == 0
    assert "f1 (choosing)" in shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "needs either the number of a feature or --report"),
        ((1, "--report", "x"), "needs either the number of a feature or --report"),
        ((10_000,), "there is no feature 10000"),
        ((1, "--judge", "demo"), "belong to --report"),
        (("--report", "x", "--judge", "http://127.0.0.1:9/v1"), "--judge-name"),
        (("--report", "x", "--set", "clear=1.5"), "clear is a share"),
        (("--report", "x", "--set", "score.features=1"), "score"),
    ],
)
def test_mistakes_are_a_sentence(copied: Path, arguments: tuple[object, ...], said: str, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    result = saelab("explain", copied, *arguments)
    assert result.code == 2
    assert said in result.err
    assert "Traceback" not in result.err


def test_a_report_replaces_nothing_but_an_older_one(copied: Path, tmp_path: Path):
    (tmp_path / "precious.txt").write_text("mine")
    result = saelab("explain", copied, "--report", tmp_path, *SMALL)
    assert result.code == 2
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_features_of_another_sae_that_resemble_one(copied: Path):
    result = saelab("features", copied, 3, "--like", copied / "sae", "--top", 2, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["features"][0] == [3, pytest.approx(1, abs=1e-4)]
    used = saelab("features", copied, 3, "--like", copied / "sae", "--by", "use", "--json")
    assert (used.code == 0 and json.loads(used.out)["features"][0] == [3, 1]) or "does not fire" in used.err
    assert saelab("features", copied, 3, "--like", copied / "sae", "--by", "magic").code == 2
    assert saelab("features", copied, "--like", copied / "sae", "--specific").code == 2


@pytest.mark.parametrize("ending", ["html", "svg", "json"])
def test_a_map_is_written_in_three_forms(copied: Path, tmp_path: Path, ending: str):
    file = tmp_path / f"map.{ending}"
    result = saelab("features", copied, "--map", file, "--method", "pca", "--json")
    assert result.code == 0, result.err
    assert 0 <= json.loads(result.out)["kept_at_random"] <= json.loads(result.out)["kept"] <= 1
    if ending == "json":
        assert len(json.loads(file.read_text())["places"]) == 128
    else:
        assert "<circle" in file.read_text()


def test_a_map_and_a_search_by_meaning_say_what_they_lack(copied: Path, tmp_path: Path):
    assert "endings" in saelab("features", copied, "--map", tmp_path / "map.bmp").err
    assert "go together" in saelab("features", copied, "--meaning", "boats").err
