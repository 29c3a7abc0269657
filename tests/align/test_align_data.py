"""Records in, tokens out: every form that data sets come in, every fault named with its line."""

import gzip
import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_for_tests import CHAT, byte_pairs, words

from saelab.align.encoding import (
    Codec,
    Encoded,
    LengthReport,
    collate,
    encode_completions,
    encode_pairs,
    encode_questions,
)
from saelab.align.records import (
    Message,
    read_demonstrations,
    read_labelled,
    read_preferences,
    read_questions,
)
from saelab.errors import ConfigError, TextError


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PLAIN = {"prompt": "a b", "chosen": "c", "rejected": "d e"}
TURNS = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]


def test_the_forms_of_a_preference_are_read_alike(tmp_path):
    question = [{"role": "user", "content": "How?"}]
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "So."), ("rejected", "No."))
    }
    start = "\n\nHuman: How?\n\nAssistant:"
    rows = [
        {"prompt": question, "chosen": "So.", "rejected": "No."},
        {"prompt": question, **answers},
        {name: question + answer for name, answer in answers.items()},
        {"chosen": f"{start} So.", "rejected": f"{start} No."},
        {"prompt": start, "chosen": "So.", "rejected": "No."},
    ]
    records = read_preferences(written(tmp_path / "p.jsonl", rows)).required()
    assert len(records) == 5
    assert all(record == records[0] for record in records)
    assert records[0].prompt == (Message("user", "How?"),)


def test_a_transcript_keeps_its_earlier_turns(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: How are you?\n\nAssistant:"
    row = {"chosen": f"{start} Well.", "rejected": f"{start} Go away.\n\nReally."}
    [record] = read_preferences(written(tmp_path / "p.jsonl", [row])).required()
    assert [turn.role for turn in record.prompt] == ["user", "assistant", "user"]
    assert (record.chosen, record.rejected) == ("Well.", "Go away.\n\nReally.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "it has no rejected, only prompt, chosen"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"chosen": "b", "rejected": "c"}, "no prompt beside it"),
        ({"chosen": TURNS, "rejected": [{"role": "user", "content": "Why?"}, TURNS[1]]}, "differ before the last turn"),
        ({"chosen": TURNS[:1], "rejected": TURNS[:1]}, "ends with a turn of user"),
        ({"prompt": TURNS, "chosen": "b", "rejected": "c"}, "prompt ends with a turn of the assistant"),
        ({"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "c"}, "a turn of chosen lacks role or content"),
        ([1, 2], "not an object with named fields"),
    ],
)
def test_a_record_that_cannot_be_used_is_named_by_its_line(tmp_path, row, reason):
    reading = read_preferences(written(tmp_path / "p.jsonl", [PLAIN, row, PLAIN]))
    assert len(reading.records) == 2
    assert reading.lines == [1, 3]
    [fault] = reading.faults
    assert fault.line == 2
    assert reason in fault.reason
    with pytest.raises(TextError, match=r"has 1 records that cannot be used \(line 2: .*skip"):
        reading.required()


def test_the_same_records_come_out_of_every_kind_of_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [PLAIN, {"prompt": "f", "chosen": "g", "rejected": "h"}]
    plain = written(tmp_path / "p.jsonl", rows)
    (tmp_path / "p.json").write_text(json.dumps(rows))
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as stream:
        stream.write(plain.read_text() + "\n")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    expected = read_preferences(plain).records
    for name in ("p.json", "p.jsonl.gz", "p.parquet"):
        assert read_preferences(tmp_path / name).records == expected


def test_other_kinds_of_record(tmp_path):
    [good] = read_labelled(
        written(tmp_path / "l.jsonl", [{"prompt": "a", "completion": "b", "label": True}])
    ).required()
    assert good.label is True
    faulty = read_labelled(written(tmp_path / "m.jsonl", [{"prompt": "a", "completion": "b", "label": "yes"}]))
    assert "must be true or false" in faulty.faults[0].reason
    rows = [{"instruction": "a", "response": "b"}, {"messages": TURNS}]
    first, second = read_demonstrations(written(tmp_path / "d.jsonl", rows)).required()
    assert (first.prompt, first.completion) == ("a", "b")
    assert (second.prompt, second.completion) == ((Message("user", "How?"),), "So.")
    assert read_questions(written(tmp_path / "q.jsonl", rows[:1])).required()[0].prompt == "a"


def test_an_instruction_keeps_the_material_that_it_is_about(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Add 1 and 2.", "input": "", "output": "3"},
    ]
    first, second = read_demonstrations(written(tmp_path / "d.jsonl", rows)).required()
    assert (first.prompt, second.prompt) == ("Add.\n\n1 2", "Add 1 and 2.")


def test_lines_that_are_prompts_are_read_as_such(tmp_path):
    [first, second] = read_questions(written(tmp_path / "q.jsonl", ["Why?", {"prompt": "How?"}])).required()
    assert (first.prompt, second.prompt) == ("Why?", "How?")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("p.jsonl", b"{nonsense\n", "line 1 of .* is not JSON"),
        ("p.jsonl", b"\xff\xfe\n", "not UTF-8"),
        ("p.jsonl", b"", "holds no records"),
        ("p.json", b"{}", "must hold a list of records"),
        ("p.parquet", b"PAR1", "not readable as Parquet"),
        ("p.jsonl.gz", b"not gzip", "cannot be read"),
        ("p.txt", b"hello", r"none of \.jsonl, \.json, \.parquet"),
    ],
)
def test_files_of_no_use_are_refused_in_a_sentence(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=complaint):
        read_preferences(tmp_path / name)


def test_a_wrong_name_gets_the_nearest(tmp_path):
    written(tmp_path / "pairs.jsonl", [PLAIN])
    with pytest.raises(TextError, match=r"did you mean pairs\.jsonl"):
        read_preferences(tmp_path / "pair.jsonl")


# --- tokens


def test_bos_stands_once_in_front_and_eos_once_behind():
    codec = Codec(words(), context=20)
    if codec.prompt_ids("a b") != (4, 5):  # this tokenizer adds no BOS by itself, so none is added
        raise AssertionError(codec.prompt_ids("a b"))
    assert codec.completion_ids("c d") == (6, 7, 2)
    assert codec.completion_ids("c d <eos>") == (6, 7, 2)
    assert codec.completion_ids("c <eos> d") == (6, 2, 7, 2)  # an EOS within is a token like any other


def test_masks_come_from_lengths_even_where_pad_is_eos_and_eos_stands_in_the_prompt():
    codec = Codec(words(pad_is_eos=True), context=20)
    sequences = [codec.encode("a <eos> b", "c d"), codec.encode("a", "c")]
    batch = collate(sequences, pad_id=codec.pad_id)
    assert batch.ids.tolist() == [[4, 2, 5, 6, 7, 2], [4, 6, 2, 2, 2, 2]]
    assert batch.completion_mask.tolist() == [[False] * 3 + [True] * 3, [False, True, True] + [False] * 3]
    assert batch.attention_mask.sum(1).tolist() == [6, 3]
    assert batch.n_completion.tolist() == [3, 2]


def test_an_answer_that_does_not_fit_loses_its_eos_and_says_so():
    codec = Codec(words(), context=4)
    cut = codec.encode("a b", "c d e")
    assert cut.completion_ids == (6, 7)
    assert cut.truncated
    with pytest.raises(TextError, match="the prompt has 4 tokens, and the context is 4"):
        codec.encode("a b c d", "e")
    with pytest.raises(TextError, match="the prompt is empty"):
        codec.encode("", "e")


TEXT = "the weather there is what the weather was, hello\nhow are they?"


@settings(deadline=None, max_examples=60)
@given(split=st.integers(1, len(TEXT) - 1))
def test_training_sees_the_tokens_that_sampling_continues_wherever_the_boundary_falls(split):
    """A BPE token that spans the boundary would change the prompt; separate encoding cannot have one."""
    codec = Codec(byte_pairs(), context=200)
    prompt, completion = TEXT[:split], TEXT[split:]
    encoded = codec.encode(prompt, completion)
    assert encoded.prompt_ids == codec.prompt_ids(prompt)
    assert codec.decode(encoded.prompt_ids) == prompt
    assert codec.decode(encoded.completion_ids) == completion


def test_a_conversation_ends_its_turn_with_the_eos_token():
    codec = Codec(byte_pairs(), context=200)
    prompt = (Message("user", "how are you?"),)
    encoded = codec.encode(prompt, "hello")
    tokenizer = codec.tokenizer
    turns = [{"role": "user", "content": "how are you?"}, {"role": "assistant", "content": "hello"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(encoded.prompt_ids + encoded.completion_ids, skip_special_tokens=False) == whole
    assert Codec(byte_pairs(), context=200, chat=True).prompt_ids("how are you?") == encoded.prompt_ids


def test_templates_that_would_train_on_other_tokens_are_refused():
    thinking = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    with pytest.raises(ConfigError, match="does not put the answer behind the prompt"):
        Codec(byte_pairs(chat_template=thinking), context=100)
    with pytest.raises(ConfigError, match=r"ends a turn with '<\|end\|>', but the EOS token is '<\|other\|>'"):
        Codec(byte_pairs(eos="<|other|>"), context=100)
    silent = byte_pairs()
    silent.eos_token = None
    with pytest.raises(ConfigError, match="no EOS token"):
        Codec(silent, context=100)


def test_prompts_that_do_not_fit_are_faults_of_their_lines(tmp_path):
    rows = [
        PLAIN,
        {"prompt": "a " * 30, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
    ]
    reading = encode_pairs(read_preferences(written(tmp_path / "p.jsonl", rows)), Codec(words(), context=10))
    assert [fault.line for fault in reading.faults] == [2, 3]
    assert len(reading.records) == len(reading.lines) == 1
    assert reading.records[0].chosen.completion_ids == (6, 2)
    questions = read_questions(written(tmp_path / "q.jsonl", rows[:2]))
    assert len(encode_questions(questions, Codec(words(), context=33), n_new_tokens=4).faults) == 1


def test_the_length_report_counts_what_was_cut(tmp_path):
    rows = [{"prompt": "a", "completion": "b " * n} for n in (1, 2, 9)]
    reading = encode_completions(read_demonstrations(written(tmp_path / "d.jsonl", rows)), Codec(words(), context=6))
    report = LengthReport.of(reading.records)
    assert (report.n_sequences, report.n_truncated) == (3, 1)
    assert report.completion == (3, 5, 5)
    assert "1 cut by the context" in str(report)
    assert "answer" in str(report)
    assert "answer" not in str(LengthReport.of([Encoded((1, 2), (), truncated=False)]))


def test_a_batch_can_be_taken_apart_again():
    codec, rng = Codec(words(), context=40), random.Random(0)
    letters = "abcdefgh"
    sequences = [
        codec.encode(
            " ".join(rng.choices(letters, k=rng.randint(1, 9))), " ".join(rng.choices(letters, k=rng.randint(1, 9)))
        )
        for _ in range(20)
    ]
    batch = collate(sequences, pad_id=codec.pad_id)
    for row, n_prompt, n_total, sequence in zip(batch.ids, batch.n_prompt, batch.n_total, sequences, strict=True):
        assert tuple(row[:n_prompt].tolist()) == sequence.prompt_ids
        assert tuple(row[n_prompt:n_total].tolist()) == sequence.completion_ids
        assert torch.equal(row[n_total:], torch.full_like(row[n_total:], codec.pad_id))
