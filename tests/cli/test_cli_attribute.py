from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from commandline import saelab

TEXT = ("--text", "the old river and the tower", "--answer", " city", "--wrong", " king")
CORRUPT = ("--corrupt", "the old music and the tower")
REST = " and the old river and the long war and the great king and the south island and the light house"
PAIR = {"clean": "the water" + REST, "corrupt": "the music" + REST, "answer": " city", "wrong": " king"}


@pytest.fixture(scope="module")
def second_sae(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of the layer behind that of the workspace; never trained, which a graph does not mind."""
    import dataclasses

    import torch

    from saelab.sae.architectures import new_sae
    from saelab.sae.io import load_sae, save_sae
    from saelab.sae.topk import TopKConfig

    first = load_sae(workspace)
    sae = new_sae(TopKConfig(d_sae=64, k=4), d_in=first.d_in, generator=torch.Generator().manual_seed(0))
    sae.metadata = dataclasses.replace(first.metadata, hook_name="blocks.2.hook_resid_post", extra={})
    path = tmp_path_factory.mktemp("saes") / "later"
    save_sae(sae, path)
    return path


def test_attributions_are_shown_and_written(workspace: Path, tmp_path: Path):
    result = saelab("attribute", workspace, *TEXT, *CORRUPT, "--out", tmp_path / "found.html", "--steps", 4)
    assert result.code == 0, result.err
    assert "attribution" in result.out
    assert "the error's share is" in result.out
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert found["metric"] == "logit difference of ' city' and ' king'"
    total = sum(found["per_token"])
    assert total == pytest.approx(found["effect"] - found["gap"], abs=1e-5)
    page = (tmp_path / "found.html").read_text("utf-8")
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_one_text_is_drawn(workspace: Path, tmp_path: Path, suffix: str):
    path = tmp_path / f"found.{suffix}"
    result = saelab("attribute", workspace, *TEXT, "--out", path, "--steps", 2, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["files"] == [str(path), str(tmp_path / "found.json")]
    if suffix == "png":
        assert path.read_bytes().startswith(b"\x89PNG")
    else:
        ElementTree.parse(path)


def test_two_saes_make_a_graph(workspace: Path, second_sae: Path, tmp_path: Path):
    path = tmp_path / "graph.svg"
    result = saelab(
        "attribute", workspace, second_sae, *TEXT, *CORRUPT, "--top", 4, "--steps", 2, "--json", "--out", path
    )
    assert result.code == 0, result.err
    graph = json.loads(result.out)
    assert [layer["hook_name"] for layer in graph["layers"]] == ["blocks.1.hook_resid_post", "blocks.2.hook_resid_post"]
    assert len(graph["nodes"]) == 8
    assert graph["edges"]
    drawn = ElementTree.parse(path).getroot()
    lines = [element for element in drawn.iter() if element.tag.endswith("line")]
    assert len(lines) == len(graph["edges"])


def test_a_file_of_pairs_makes_curves(workspace: Path, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n", "utf-8")
    result = saelab("attribute", workspace, "--pairs", path, "--steps", 2, "--draws", 2, "--out", tmp_path / "c.svg")
    assert result.code == 0, result.err
    assert "over random" in result.out
    found = json.loads((tmp_path / "c.json").read_text("utf-8"))
    assert [point["n_features"] for point in found["faithfulness"]] == [1, 2, 4, 8, 16, 32, 64]
    assert found["completeness"][3]["random"].keys() == {"value", "low", "high"}
    ElementTree.parse(tmp_path / "c.svg")


def test_mistakes_are_one_sentence(workspace: Path, tmp_path: Path):
    for arguments, expected in (
        ((), "--text with --answer, or --pairs"),
        (("--text", "the river"), "--answer"),
        ((*TEXT[:2], "--answer", " a whole sentence"), "one token"),
        ((*TEXT, "--corrupt", "the"), "tokens"),
        ((*TEXT, *CORRUPT, "--reference", "the river"), "leave one of them out"),
        ((*TEXT, "--out", tmp_path / "found.gif"), ".gif"),
        (("--pairs", tmp_path / "none.jsonl"), "cannot be read"),
        (("--pairs", tmp_path / "none.jsonl", "--out", tmp_path / "a.png"), ".svg or .html"),
    ):
        result = saelab("attribute", workspace, *arguments)
        assert result.code == 2, (arguments, result)
        assert result.err.strip().splitlines()[-1].startswith("error: ")
        assert expected in result.err


def test_lines_that_are_no_pairs_are_named(workspace: Path, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    for content, expected in (
        ("\n", "no pairs"),
        ("{", "line 1 is not JSON"),
        (json.dumps({"clean": PAIR["clean"]}), "line 1 must be an object"),
    ):
        path.write_text(content, "utf-8")
        result = saelab("attribute", workspace, "--pairs", path)
        assert result.code == 2
        assert expected in result.err
