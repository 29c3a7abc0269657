from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saelab.activations import text as text_module
from saelab.activations.text import Document, TextConfig, is_held_out, open_text
from saelab.errors import ConfigError, TextError


def texts_of(source: Path | str, **settings: object) -> list[str]:
    return [document.text for document in open_text(TextConfig(source=str(source), **settings))]  # type: ignore[arg-type]


def test_a_text_file_is_one_document_named_after_the_file(tmp_path: Path):
    (tmp_path / "book.txt").write_text("Erste Zeile: Ä\nzweite Zeile\n", "utf-8")
    assert list(open_text(TextConfig(source=str(tmp_path / "book.txt")))) == [
        Document("Erste Zeile: Ä\nzweite Zeile\n", "book.txt")
    ]


def test_the_same_text_with_other_line_ends_or_a_byte_order_mark_is_the_same_document(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts_of(tmp_path) == ["one\ntwo\n"] * 2


def test_a_large_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path):
    paragraph = "word " * 200 + "\n\n"
    (tmp_path / "big.txt").write_text(paragraph * 200)
    documents = list(open_text(TextConfig(source=str(tmp_path / "big.txt"))))
    assert "".join(document.text for document in documents) == paragraph * 200
    assert [document.title for document in documents[:2]] == ["big.txt", "big.txt, part 2"]
    assert all(document.text.endswith("\n\n") and len(document.text) < 52_000 for document in documents)


def test_a_large_text_file_without_blank_lines_is_cut_at_line_ends(tmp_path: Path):
    (tmp_path / "big.txt").write_text("word " * 20 + "\n" + ("word " * 20 + "\n") * 3000)
    documents = texts_of(tmp_path / "big.txt")
    assert len(documents) > 1
    assert all(document.endswith("\n") for document in documents)


@pytest.mark.parametrize("compressed", [False, True])
def test_jsonl_gives_a_document_a_line_with_its_title_if_it_has_one(tmp_path: Path, compressed: bool):
    lines = [json.dumps({"body": "first", "title": "One"}), "", json.dumps({"body": "second"})]
    data = "\n".join(lines).encode()
    file = tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl")
    file.write_bytes(gzip.compress(data) if compressed else data)
    assert list(open_text(TextConfig(source=str(file), column="body"))) == [
        Document("first", "One"),
        Document("second", f"{file.name} line 3"),
    ]


def test_parquet_gives_a_document_a_row(tmp_path: Path):
    table = pyarrow.table({"text": ["first", "second"], "title": ["One", None], "other": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(open_text(TextConfig(source=str(tmp_path / "a.parquet")))) == [
        Document("first", "One"),
        Document("second", "a.parquet row 2"),
    ]


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}')
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "notes.md").write_text("not text of the data set")
    assert texts_of(tmp_path) == ["first", "second", "third"]


def bad_files(folder: Path) -> dict[str, bytes]:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"] * 1000}), folder / "whole.parquet")
    whole = (folder / "whole.parquet").read_bytes()
    (folder / "whole.parquet").unlink()
    return {
        "latin.txt": "Ärger".encode("latin-1"),
        "latin.jsonl": '{"text": "Ärger"}'.encode("latin-1"),
        "torn.jsonl": b'{"text": "a"}\n{"text": "b',
        "list.jsonl": b'["a"]',
        "number.jsonl": b'{"text": 3}',
        "column.jsonl": b'{"texts": "a"}',
        "surrogate.jsonl": b'{"text": "\\ud800"}',
        "deep.jsonl": b"[" * 100_000,
        "torn.parquet": whole[: len(whole) // 2],
        "torn.txt.gz": gzip.compress(b"text " * 1000)[:-20],
        "none.txt.gz": b"this is not compressed",
        "sheet.xlsx": b"x",
    }


BAD_FILES = [
    *("latin.txt", "latin.jsonl", "torn.jsonl", "list.jsonl", "number.jsonl", "column.jsonl", "surrogate.jsonl"),
    *("deep.jsonl", "torn.parquet", "torn.txt.gz", "none.txt.gz", "sheet.xlsx"),
]


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_named_in_one_sentence(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(bad_files(tmp_path)[name])
    with pytest.raises(TextError) as error:
        texts_of(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
    assert "; " in str(error.value)


def test_a_missing_column_names_the_nearest_one(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"contents": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(TextError, match="no column 'content'; did you mean contents"):
        texts_of(tmp_path / "a.parquet", column="content")


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/missing/folder", "a/b/c"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(source: str):
    with pytest.raises(TextError, match="there is no text file or folder"):
        texts_of(source)


def test_an_empty_folder_says_what_it_lacks(tmp_path: Path):
    with pytest.raises(TextError, match=r"holds no \.txt"):
        texts_of(tmp_path)


def test_titles_are_one_line_of_valid_text(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "title": "two\nlines \ud800"}))
    (document,) = open_text(TextConfig(source=str(tmp_path / "a.jsonl")))
    assert document.title == "two lines ?"


# --- data sets of the hub, by way of a local directory, which the same function opens


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def data_set(tmp_path: Path, no_network: None) -> Path:
    folder = tmp_path / "data_set"
    folder.mkdir()
    for split, words in {"train": ["first", "second"], "test": ["third"]}.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"content": w, "n": 1}) + "\n" for w in words))
    return folder


def test_a_data_set_streams_one_split(data_set: Path):
    spec = TextConfig(source=str(data_set), column="content")
    assert [d.text for d in text_module._from_hub(spec)] == ["first", "second"]
    spec = TextConfig(source=str(data_set), column="content", split="test")
    assert [d.text for d in text_module._from_hub(spec)] == ["third"]


@pytest.mark.parametrize("settings", [{"split": "valid"}, {"column": "text"}, {"subset": "french"}])
def test_a_data_set_without_the_wanted_part_says_so(data_set: Path, settings: dict[str, str]):
    spec = TextConfig(source=str(data_set), **({"column": "content"} | settings))  # type: ignore[arg-type]
    with pytest.raises(TextError) as error:
        list(text_module._from_hub(spec))
    assert str(data_set) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_one_sentence(no_network: None):
    with pytest.raises(TextError, match="the data set 'nobody/nothing' cannot be read") as error:
        texts_of("nobody/nothing")
    assert "\n" not in str(error.value)


# --- held out


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds_documents(text: str, one: float, two: float):
    small, large = sorted((one, two))
    assert is_held_out(text, large) or not is_held_out(text, small)
    assert not is_held_out(text, 0.0)
    assert is_held_out(text, 1.0)


def test_about_the_fraction_asked_for_is_held_out_and_always_the_same_documents():
    chosen = [is_held_out(f"document {i}", 0.05) for i in range(20_000)]
    assert sum(chosen) == pytest.approx(1000, abs=100)  # three standard deviations
    # the rule is part of the format: it must never change
    assert [i for i, held_out in enumerate(chosen) if held_out][:3] == [21, 22, 55]


def test_a_cap_below_one_token_is_refused():
    with pytest.raises(ConfigError, match="max_tokens_per_document"):
        TextConfig(max_tokens_per_document=0)
