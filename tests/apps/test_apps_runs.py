"""Runs are found by name under one root, whatever else lies there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from saelab.errors import ArtifactError, ConfigError
from saelab_explorer.runs import find_runs, provenance, read_curves, read_evaluation, root_and_name


def test_every_directory_with_a_stage_is_a_run(root: Path):
    assert list(find_runs(root)) == ["hostile", "indexed", "small", "twin"]


def test_what_is_no_run_is_left_out(root: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("not a run")
    (tmp_path / "torn" / "sae").mkdir(parents=True)
    (tmp_path / "torn" / "sae" / "run.json").write_text("{")
    shutil.copytree(root / "indexed", tmp_path / "good")
    assert list(find_runs(tmp_path)) == ["good"]


def test_a_link_that_leads_out_of_the_root_is_no_run(root: Path, tmp_path: Path):
    (tmp_path / "elsewhere").symlink_to(root / "indexed", target_is_directory=True)
    assert find_runs(tmp_path) == {}


def test_a_run_may_be_given_instead_of_the_root(root: Path):
    assert root_and_name(root / "small", None) == (root.resolve(), "small")
    assert root_and_name(root, "indexed") == (root.resolve(), "indexed")


def test_an_unknown_run_is_named_with_its_neighbours(root: Path):
    with pytest.raises(ConfigError, match="no run 'smal'; did you mean small"):
        root_and_name(root, "smal")


def test_a_root_that_is_not_there_says_how_to_make_a_run(tmp_path: Path):
    with pytest.raises(ArtifactError, match="saelab demo"):
        root_and_name(tmp_path / "nothing", None)


def test_the_command_for_a_missing_stage_can_be_typed_as_it_is(root: Path):
    run = find_runs(root)["indexed"]
    assert run.command("eval") == f"saelab eval {root.resolve() / 'indexed'}"
    assert run.command("activations").endswith("indexed/activations")
    assert not run.has("sae")
    assert run.has("index")


def test_an_interrupted_training_is_continued_where_it_lies_and_shows_its_curves(root: Path, tmp_path: Path):
    shutil.copytree(root / "small", tmp_path / "half")
    (tmp_path / "half" / "sae" / "DONE").unlink()
    run = find_runs(tmp_path)["half"]
    assert run.command("sae") == f"saelab train --resume {tmp_path / 'half' / 'sae'}"
    assert read_curves(run)[-1]["tokens"] == 30_000
    assert [record.finished for record in provenance(run)] == [True, False, True, True]


def test_provenance_follows_the_way_of_the_data(root: Path):
    records = provenance(find_runs(root)["small"])
    assert [record.stage for record in records] == ["activations", "sae", "eval", "index"]
    hashes = {record.stage: record.sha256 for record in records}
    assert records[1].parents == {"activations": hashes["activations"]}
    assert "train" in records[1].command


def test_a_damaged_evaluation_is_named(root: Path, tmp_path: Path):
    shutil.copytree(root / "small" / "eval", tmp_path / "run" / "eval")
    (tmp_path / "run" / "eval" / "eval.json").write_text('{"metrics"')
    with pytest.raises(ArtifactError, match=r"eval\.json cannot be read"):
        read_evaluation(find_runs(tmp_path)["run"])


def test_the_evaluation_holds_what_the_cards_show(root: Path):
    evaluation = read_evaluation(find_runs(root)["small"])
    json.dumps(evaluation)
    assert {"value", "low", "high"} <= set(evaluation["metrics"]["explained_variance"])
