"""saelab steer: modes, conditions, and the record with its baselines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commandline import saelab

import saelab as sl


def refused(*arguments: object) -> str:
    result = saelab(*arguments)
    assert result.code == 2, result.err
    return result.err


@pytest.fixture(scope="module")
def busy(workspace: Path) -> int:
    return int(np.argmax(sl.load_index(workspace).column("n_clear")))


def written(workspace: Path, *arguments: object) -> str:
    result = saelab(
        "steer", workspace, "--feature", 3, "--prompt", "The old clock", "--max-new-tokens", 6, *arguments, "--json"
    )
    assert result.code == 0, result.err
    return json.loads(result.out)["steered"]


def test_features_are_set_capped_and_steered_under_a_condition(workspace: Path, busy: int):
    plain = written(workspace, "--strength", 0)
    assert written(workspace, "--mode", "orthogonal", "--strength", 6) != plain
    assert written(workspace, "--mode", "cap", "--strength", 1e6) == plain
    assert written(workspace, "--strength", 6, "--when", busy) != plain
    assert written(workspace, "--strength", 6, "--when", f"{busy}:1e9") == plain


def test_conditions_and_strengths_that_are_none(workspace: Path):
    assert "--when needs FEATURE or FEATURE:ABOVE" in refused("steer", workspace, "--feature", 1, "--when", "often")
    assert "there is no feature 999999" in refused("steer", workspace, "--feature", 1, "--when", 999999)
    assert "needs a strength" in refused("steer", workspace, "--feature", 1, "--mode", "cap")
    assert "leave out --strength, --value and --when" in refused("steer", workspace, "--record", 1, "--when", 1)
    assert "--baselines needs features" in refused("steer", workspace, "--baselines")


def test_a_record_with_baselines_goes_on_where_it_was_killed(
    workspace: Path, busy: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from saelab.interp import dose, steering_record, steering_suite

    monkeypatch.setattr(steering_record.RecordConfig, "__init__", _short(steering_record.RecordConfig.__init__))
    monkeypatch.setattr(dose.DoseConfig, "__init__", _brief(dose.DoseConfig.__init__))
    made: list[str] = []
    real = steering_suite.dose_curve

    def counted(ground, name, *arguments, **more):
        if len(made) == 3:
            made.append("killed")
            raise KeyboardInterrupt
        made.append(name)
        return real(ground, name, *arguments, **more)

    monkeypatch.setattr(steering_suite, "dose_curve", counted)
    command = ("steer", workspace, "--feature", busy, "--baselines", "--kl", 0.05, "--out", tmp_path / "steer")
    assert saelab(*command).code == 130
    assert not (tmp_path / "steer").exists()
    result = saelab(*command, "--json")
    assert result.code == 0, result.err
    assert len(made) == 4 + 8 - 3  # four random directions, the feature, three baselines; three were kept
    report = json.loads(result.out)
    assert json.loads((tmp_path / "steer" / "steer.json").read_text()) == report
    assert not list(tmp_path.glob("*.part-*"))
    (feature,) = report["baselines"]["features"]
    assert feature["feature"] == busy
    names = ["mean difference", "probe", "random direction", "random feature"]
    prompts = ["prompt: write about", "prompt: next word", "prompt: words twice"]
    assert [c["baseline"] for c in feature["comparisons"]] == names + prompts
    assert report["advantage"]["value"] == report["features"][0]["advantage"]  # the record as without baselines
    for ending in ("md", "html"):
        assert report["baselines"]["winner"] in (tmp_path / "steer" / f"report.{ending}").read_text()


def _short(init):
    """A record of three prompts and two random directions: what is tested is the path, not the science."""
    return lambda self, **given: init(self, **{"prompts": ("The old", "A small", "This"), "n_random": 2} | given)


def _brief(init):
    return lambda self, **given: init(self, **{"max_new_tokens": 2} | given)
