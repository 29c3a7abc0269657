"""saelab probe: what it prints, what it keeps, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import saelab

QUICK = ("--set", "shuffles=2", "--set", "draws=50", "--position", "mean")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labelled") / "places.jsonl"
    lines = [
        {
            "said": f"the long {'river' if i % 2 else 'city'} of {i // 2} south",
            "kind": "river" if i % 2 else "city",
            "set": "a" if i < 80 else "b",
            "pair": i // 2,
        }
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def test_probes_are_printed_kept_and_loaded(workspace: Path, places: Path, tmp_path: Path):
    from saelab.interp.probe_direction import Probe

    out = tmp_path / "probe"
    given = (
        "probe",
        f"{places}:text=said,label=kind",
        "--sae",
        workspace,
        "--hook",
        "blocks.*.resid_post",
        "--group",
        "pair",
        "--where",
        "set=a",
        "--out",
        out,
        *QUICK,
    )
    result = saelab(*given, "--json")
    assert result.code == 0, result.err
    content = json.loads(result.out)
    assert content == json.loads((out / "probe.json").read_text())
    assert content["data"]["n_texts"] == 80
    assert content["data"]["n_groups"] == 40
    assert {probe["layer"] for probe in content["probes"]} == {0, 1, 2}
    assert {probe["method"] for probe in content["probes"]} == {"logistic", "mean_difference", "sae_k1", "sae_k5"}
    for probe in content["probes"]:
        kept = Probe.load(out / probe["directory"])
        assert (kept.about.method, kept.hook_name) == (probe["method"], probe["hook_name"])
    best = Probe.load(out)
    assert f"probes/{best.name}" == content["best"]
    torch.testing.assert_close(Probe.load(out / content["best"]).direction, best.direction)
    for name in ("report.html", "report.md", "sweep.svg"):
        assert "bag of words" in (out / name).read_text()
    assert "[probe]" in saelab("show", out).out
    again = saelab(*given)
    assert again.code == 0, again.err
    assert "shuffled labels" in again.out
    assert "a text's group is its field 'pair'" in again.out


def test_without_an_sae_a_model_and_a_hook_are_enough(tiny_model_dir: Path, places: Path):
    result = saelab(
        "probe",
        f"{places}:text=said,label=kind",
        "--model",
        tiny_model_dir,
        "--hook",
        "blocks.1.hook_mlp_out",
        "--texts",
        60,
        *QUICK,
        "--json",
    )
    assert result.code == 0, result.err
    content = json.loads(result.out)
    assert content["data"]["n_texts"] == 60
    assert "copies stay" in content["data"]["grouped_by"]
    assert [probe["hook_name"] for probe in content["probes"]] == ["blocks.1.hook_mlp_out"] * 2


def test_the_settings_can_be_printed():
    result = saelab("probe", "--position", "max", "--print-config")
    assert result.code == 0
    assert 'position = "max"' in result.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("probe", "--model", "demo"), "needs a file of labelled texts"),
        (("probe", "a.jsonl"), "needs a model"),
        (("probe", "a.jsonl", "--model", "demo"), "needs a hook"),
        (("probe", "PLACES", "--model", "MODEL", "--hook", "blocks.1.hook_resid_post"), "no field 'text'"),
        (("probe", "PLACES:text=said,label=kind", "--model", "MODEL", "--hook", "blocks.*.hook_red"), "is like"),
        (("probe", "PLACES", "--model", "MODEL", "--hook", "x", "--where", "set"), "FIELD=VALUE"),
        (("probe", "PLACES:text=said,label=pair", "--model", "MODEL", "--hook", "x"), "60 labels"),
        (("probe", "PLACES", "--model", "MODEL", "--hook", "x", "--position", "middle"), "position must be"),
        (("probe", "PLACES", "--model", "MODEL", "--hook", "x", "--set", "shuffels=2"), "did you mean shuffles"),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple, sentence: str, places: Path, tiny_model_dir: Path):
    spelled = [a.replace("PLACES", str(places)).replace("MODEL", str(tiny_model_dir)) for a in arguments]
    result = saelab(*spelled)
    assert result.code == 2, result
    assert sentence in result.err
    assert "Traceback" not in result.err


def test_other_results_are_not_replaced(workspace: Path, places: Path):
    result = saelab("probe", f"{places}:text=said,label=kind", "--sae", workspace, "--out", workspace / "sae")
    assert result.code == 2
    assert "would replace" in result.err
