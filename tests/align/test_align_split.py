"""What trains and what is held out."""

import json

import pytest
from tokenizers_for_tests import words

from saelab.align.data import DataConfig, is_held_out, load_demonstrations, load_labelled, load_pairs, load_questions
from saelab.align.encoding import Codec
from saelab.errors import ConfigError, TextError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def codec():
    return Codec(words(), context=12)


def file_of(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(n=200):
    prompts = [f"{LETTERS[i % 26]} {LETTERS[i // 26]} {LETTERS[i * 7 % 26]}" for i in range(n)]
    return [{"prompt": prompt, "chosen": "a b", "rejected": "c"} for prompt in prompts]


def test_the_same_prompts_are_held_out_whatever_else_is_in_the_file(codec, tmp_path):
    rows = pairs()
    whole = load_pairs(DataConfig(train=file_of(tmp_path / "a.jsonl", rows)), codec)
    half = load_pairs(DataConfig(train=file_of(tmp_path / "b.jsonl", rows[::2])), codec)
    assert len(whole.train) + len(whole.held_out) == 200
    assert 5 < len(whole.held_out) < 40
    assert set(half.held_out) <= set(whole.held_out)
    assert set(half.train) <= set(whole.train)
    assert not {p.chosen.prompt_ids for p in whole.train} & {p.chosen.prompt_ids for p in whole.held_out}


def test_the_share_held_out_is_the_one_asked_for():
    out = sum(is_held_out(f"prompt {i}", share=0.2) for i in range(5000))
    assert 900 < out < 1100


def test_a_file_of_its_own_can_be_held_out_and_limits_hold(codec, tmp_path):
    train, held_out = file_of(tmp_path / "a.jsonl", pairs(50)), file_of(tmp_path / "b.jsonl", pairs(30))
    split = load_pairs(DataConfig(train=train, held_out=held_out, limit=20, held_out_limit=10), codec)
    assert (len(split.train), len(split.held_out)) == (20, 10)
    assert split.lengths.n_sequences == 40


def test_faults_stop_everything_or_are_counted(codec, tmp_path):
    rows = pairs(60)
    rows[3]["chosen"] = ""
    rows[7]["prompt"] = "a " * 20
    path = file_of(tmp_path / "a.jsonl", rows)
    with pytest.raises(TextError, match=r"2 records that cannot be used \(line 4: chosen is empty; line 8: the prompt"):
        load_pairs(DataConfig(train=path, held_out_share=1e-9, held_out=path), codec)
    split = load_pairs(DataConfig(train=path, on_fault="skip"), codec)
    assert sorted(fault.line for fault in split.faults) == [4, 8]
    assert len(split.train) + len(split.held_out) == 58


def test_other_kinds_are_divided_alike(codec, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": "a b", "label": i % 2 == 0} for i, row in enumerate(pairs(80))]
    config = DataConfig(train=file_of(tmp_path / "a.jsonl", rows))
    demonstrations = load_demonstrations(config, codec)
    labelled = load_labelled(config, codec)
    questions = load_questions(config, codec, n_new_tokens=4)
    assert len(demonstrations.train) == len(labelled.train) == len(questions.train)
    assert {label for _, label in labelled.train + labelled.held_out} == {True, False}
    assert [sequence for sequence, _ in labelled.train] == demonstrations.train


def test_too_few_records_are_refused(codec, tmp_path):
    with pytest.raises(TextError, match="records to train on and 0 held out"):
        load_pairs(DataConfig(train=file_of(tmp_path / "a.jsonl", pairs(1)), held_out_share=1e-9), codec)


@pytest.mark.parametrize("options", [{"held_out_share": 0.0}, {"limit": 0}, {"held_out_limit": 0}])
def test_settings_without_meaning_are_refused(options):
    with pytest.raises(ConfigError, match="must"):
        DataConfig(train="x.jsonl", **options)
