"""saelab align from the command line, on a tiny model."""

import json

import pytest
from commandline import saelab

from saelab.models.tiny import write_tiny_model

PROMPTS = [
    f"{a} {b}" for a in ("the tower", "one river", "the world", "light", "the king", "old") for b in ("of", "and", "by")
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model, and records of each kind."""
    folder = tmp_path_factory.mktemp("align")
    write_tiny_model(folder / "tiny", n_layers=2, context=400)
    pairs = [{"prompt": p, "chosen": "of the people", "rejected": "was not from her"} for p in PROMPTS]
    demonstrations = [{"prompt": p, "completion": "of the people"} for p in PROMPTS]
    for name, rows in (("pairs", pairs), ("demos", demonstrations)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(work, out, *more, steps=4):
    sizes = ["--steps", str(steps), "--batch-size", "4", "--rank", "2", "--lr", "0.01"]
    return ["--model", str(work / "tiny"), "--out", str(out), *sizes, "--set", "policy.dtype=float32", "--json", *more]


def test_the_whole_path_from_demonstrations_to_ppo(work, tmp_path):
    sft = saelab("align", "sft", work / "demos.jsonl", *options(work, tmp_path / "sft"))
    assert sft.code == 0, sft.err
    measured = json.loads(sft.out)
    assert measured["after"]["nll"]["value"] < measured["before"]["nll"]["value"]
    dpo = saelab("align", "dpo", work / "pairs.jsonl", *options(work, tmp_path / "dpo", "--loss", "sigmoid,nll=0.1"))
    assert dpo.code == 0, dpo.err
    assert json.loads(dpo.out)["after"]["accuracy"]["value"] >= 0
    reward = saelab("align", "reward", work / "pairs.jsonl", *options(work, tmp_path / "rm"))
    assert reward.code == 0, reward.err
    short = ["--set", "rollout.max_new_tokens=4"]
    for verb in ("ppo", "rloo"):
        source = ["--reward", str(tmp_path / "rm")] if verb == "ppo" else ["--reward", "rule:brevity"]
        run = saelab("align", verb, work / "demos.jsonl", *source, *options(work, tmp_path / verb, *short, steps=2))
        assert run.code == 0, run.err
        assert {"score", "kl", "n_prompts"} <= set(json.loads(run.out)["after"])
        model = json.loads((tmp_path / verb / "model.json").read_text())
        assert (model["kind"], model["base"]) == ("adapter", str(work / "tiny"))
        assert (tmp_path / verb / "DONE").exists()
    again = saelab(
        "align", "dpo", work / "pairs.jsonl", *options(tmp_path, tmp_path / "dpo2"), "--model", str(tmp_path / "sft")
    )
    assert again.code == 0, again.err
    parents = json.loads((tmp_path / "dpo2" / "parents.json").read_text())
    assert list(parents) == ["model"]


def test_a_finished_run_is_not_resumed_and_a_taken_directory_not_written(work, tmp_path):
    assert saelab("align", "sft", work / "demos.jsonl", *options(work, tmp_path / "sft")).code == 0
    finished = saelab("align", "resume", tmp_path / "sft")
    assert finished.code == 2
    assert "is finished" in finished.err
    taken = saelab("align", "sft", work / "demos.jsonl", *options(work, tmp_path / "sft"))
    assert taken.code == 2
    assert "already holds a finished run" in taken.err


@pytest.mark.parametrize(
    ("verb", "more", "complaint"),
    [
        ("dpo", ["--loss", "sigmoide"], "'sigmoide' is no loss"),
        ("dpo", ["--loss", "nll=much"], "a weight is a number"),
        ("dpo", ["--set", "data.on_faults=skip"], "did you mean on_fault"),
        ("ppo", ["--reward", "rule:warmt"], "did you mean warmth"),
        ("ppo", ["--reward", "nowhere"], "holds no reward model"),
        ("ppo", [], "reward must be set"),
    ],
)
def test_mistakes_get_a_sentence(work, tmp_path, verb, more, complaint):
    result = saelab("align", verb, work / "pairs.jsonl", *options(work, tmp_path / "run"), *more)
    assert result.code == 2
    assert complaint in result.err
    assert len(result.err.strip().splitlines()[-1]) < 500
    assert "Traceback" not in result.err


def test_bad_records_are_named_before_a_model_is_loaded(work, tmp_path):
    rows = [{"prompt": p, "chosen": "a", "rejected": "a" if i == 4 else "b"} for i, p in enumerate(PROMPTS)]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = saelab("align", "dpo", tmp_path / "bad.jsonl", *options(work, tmp_path / "run"))
    assert result.code == 2
    assert "line 5: chosen and rejected are the same" in result.err


def test_settings_are_printed_as_a_file_that_can_be_given_back(work, tmp_path):
    printed = saelab("align", "ppo", work / "demos.jsonl", "--reward", "rule:warmth", "--print-config")
    assert printed.code == 0, printed.err
    (tmp_path / "ppo.toml").write_text(printed.out)
    again = saelab("align", "ppo", "--config", tmp_path / "ppo.toml", "--print-config")
    assert again.out == printed.out
    assert "target_kl" in printed.out


def test_the_help_of_dpo_fits_a_screen():
    result = saelab("align", "dpo", "--help")
    assert result.code == 0
    assert len(result.out.splitlines()) <= 50


def test_cai_leaves_transcripts_sets_and_a_queue_that_a_person_can_decide(work, tmp_path):
    out = tmp_path / "cai"
    run = saelab(
        "align", "cai", work / "demos.jsonl", "--model", str(work / "tiny"), "--limit", "4", "--max-new-tokens", "5",
        "--out", str(out), "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    summary = json.loads(run.out)
    assert summary["n_prompts"] == 4
    transcripts = [json.loads(line) for line in (out / "revisions.jsonl").read_text().splitlines()]
    assert len(transcripts) == 4
    assert all(t["rounds"][0]["principle"] and t["rounds"][0]["critique"] for t in transcripts)
    queue = [json.loads(line) for line in (out / "review.jsonl").read_text().splitlines()]
    assert queue
    queue[0]["decision"] = "drop"
    (out / "review.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queue))
    before = len((out / "pairs.jsonl").read_text().splitlines())
    assert saelab("align", "review", out).code == 0
    assert len((out / "pairs.jsonl").read_text().splitlines()) == before - 1


def test_overopt_shows_the_hump_and_draws_it(tmp_path):
    result = saelab("align", "overopt", "--json", "--plot", str(tmp_path / "curves.svg"))
    assert result.code == 0, result.err
    assert json.loads(result.out)["curves"]["beta, exact"]["drop"] > 1
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")
    assert saelab("align", "overopt").out.count("peak") == 2
