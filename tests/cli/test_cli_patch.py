from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import saelab

PROMPTS = ("the king of the north island was old", "the people of the south island was old")
ANSWERS = ("--answer", " water", "--wrong", " river")


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> tuple[str, ...]:
    return ("--model", str(tiny_model_dir), "--device", "cpu")


def test_the_table_names_the_cells_of_largest_effect(tiny):
    result = saelab("patch", *PROMPTS, *ANSWERS, *tiny)
    assert result.code == 0, result.err
    assert "logit_difference on" in result.out
    assert "12 of 30 cells" in result.out


def test_the_picture_and_its_numbers_are_written(tiny, tmp_path):
    out = tmp_path / "map.svg"
    result = saelab("patch", *PROMPTS, *ANSWERS, *tiny, "--method", "ig", "--check", "--out", out, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["files"] == [str(out), str(tmp_path / "map.json")]
    assert found["agreement"]["n_cells"] == 30
    assert 0.5 < found["agreement"]["pearson"] <= 1
    assert json.loads((tmp_path / "map.json").read_text("utf-8"))["effects"] == found["effects"]
    assert out.read_text("utf-8").startswith("<svg")


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (("--at", "head", "--direction", "noise"), ["0", "1", "2"]),
        (("--at", "position"), ["all layers"]),
        (("--at", "head", "--to", "q.1.0", "--to", "mlp.1"), ["0", "1"]),
        (("--at", "mlp_out", "--layer", "1", "--position", "4", "--position", "5"), ["1"]),
    ],
)
def test_granularity_direction_and_receiver_are_chosen(tiny, arguments, rows):
    result = saelab("patch", *PROMPTS, *ANSWERS, *tiny, *arguments, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["rows"] == rows


@pytest.mark.parametrize("name", ["probability", "log_probability"])
def test_a_probability_takes_one_answer(tiny, name):
    result = saelab("patch", *PROMPTS, "--answer", " water", "--metric", name, *tiny, "--layer", 0, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["metric"] == name


def test_the_distance_from_the_clean_run_takes_no_answer(tiny):
    found = json.loads(saelab("patch", *PROMPTS, "--metric", "kl", *tiny, "--layer", 2, "--json").out)
    assert found["target"] == pytest.approx(0, abs=1e-5)
    assert found["shares"][0][-1] == pytest.approx(1, abs=1e-3)


def test_ablations_take_their_values_from_texts(tiny, text_file):
    for by, texts in (("zero", ()), ("mean", ("--texts", text_file)), ("resample", ("--texts", text_file))):
        arguments = ("--ablate", by, *texts, "--layer", 1, "--json")
        result = saelab("patch", PROMPTS[0], *ANSWERS, *tiny, *arguments)
        assert result.code == 0, result.err
        found = json.loads(result.out)
        assert (found["kind"], found["target"], found["shares"]) == (by, None, None)


def test_features_are_those_named_or_those_of_largest_attribution(workspace):
    shared = ("--at", "feature", "--sae", workspace, "--device", "cpu", "--json")
    named = saelab("patch", *PROMPTS, *ANSWERS, *shared, "--feature", 3, "--feature", 5)
    assert named.code == 0, named.err
    assert [row.split()[-1] for row in json.loads(named.out)["rows"]] == ["3", "5"]
    chosen = saelab("patch", *PROMPTS, *ANSWERS, *shared)
    assert chosen.code == 0, chosen.err
    assert len(json.loads(chosen.out)["rows"]) == 10


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((*PROMPTS, *ANSWERS, "--ablate", "zero"), "a corrupt prompt or --ablate, and not both"),
        ((PROMPTS[0], *ANSWERS), "a corrupt prompt or --ablate, and not both"),
        ((PROMPTS[0], *ANSWERS, "--ablate", "none"), "--ablate must be one of zero, mean, resample"),
        ((PROMPTS[0], *ANSWERS, "--ablate", "zero", "--direction", "noise"), "are for two prompts"),
        ((*PROMPTS, *ANSWERS, "--texts", "demo"), "leave them out"),
        ((*PROMPTS, "--answer", " water"), "takes --answer and --wrong"),
        ((*PROMPTS, *ANSWERS, "--metric", "kl"), "takes neither"),
        ((*PROMPTS, *ANSWERS, "--metric", "logits"), "logit_difference"),
        ((*PROMPTS, "--answer", " water river", "--wrong", " river"), "an answer must be one token"),
        ((*PROMPTS, *ANSWERS, "--at", "residual"), "--at must be one of"),
        ((*PROMPTS, *ANSWERS, "--method", "integrated"), "--method must be one of"),
        ((*PROMPTS, *ANSWERS, "--direction", "up"), "--direction must be one of"),
        ((*PROMPTS, *ANSWERS, "--check"), "give it with --method ig"),
        ((*PROMPTS, *ANSWERS, "--to", "logits", "--method", "ig"), "patched exactly"),
        ((*PROMPTS, *ANSWERS, "--to", "nowhere"), "a receiver is written"),
        ((*PROMPTS, *ANSWERS, "--at", "feature"), "needs --sae"),
        ((*PROMPTS, *ANSWERS, "--layer", 7), "layer must be between 0 and 2"),
        ((*PROMPTS, *ANSWERS, "--out", "map.pdf"), "end it in .png"),
        (("the city was", "the city was small", *ANSWERS), "positions do not correspond"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(tiny, arguments, sentence):
    result = saelab("patch", *arguments, *tiny)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert sentence in result.err
    assert len(result.err.splitlines()) == 1
