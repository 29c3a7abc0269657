"""Files of texts with labels, for probes: local files only, nothing is bundled and nothing is downloaded.

Any .jsonl, .csv (both also with .gz) or .parquet file with a field of text and a field of labels will do:

    SST-2              {"text": "a stirring , funny ...", "label": 1}                    text, label
    true-false         {"set": "cities", "statement": "The city of ...", "label": 1}     statement, label
    emotions           {"emotion": "anger", "text": "Someone takes credit ..."}          text, emotion
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saelab.errors import ConfigError, TextError, nearest

SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class LabelledFile:
    """A file of texts with labels."""

    path: Path
    """A .jsonl, .csv or .parquet file; the first two also with .gz behind."""
    text: str = "text"
    """The field that holds the text."""
    label: str = "label"
    """The field that holds the class: a number, a word, true or false."""

    @property
    def name(self) -> str:
        """The folder and the file, which together tell data sets apart: sst2/train."""
        stem = self.path.name.split(".")[0]
        folder = self.path.absolute().parent.name
        return f"{folder}/{stem}" if folder else stem


class Rows(NamedTuple):
    """What a file holds, an entry of each list a text."""

    texts: list[str]
    labels: list[str]
    fields: dict[str, list[str]]  # other fields that were asked for


def parse(spec: str) -> LabelledFile:
    """A file as the command line names it: FILE, or FILE:text=FIELD,label=FIELD.

    Raises:
        ConfigError: another field than these is set.
    """
    path, colon, fields = spec.rpartition(":")
    if not colon or "=" not in fields:
        return LabelledFile(path=Path(spec))
    settings = dict(part.partition("=")[::2] for part in fields.split(","))
    if unknown := set(settings) - {"text", "label"}:
        raise ConfigError(
            f"{spec} sets {sorted(unknown)[0]!r}, but only text and label can be set; "
            "write FILE:text=statement,label=label"
        )
    return LabelledFile(path=Path(path), **settings)


def read_rows(file: LabelledFile, *, fields: Sequence[str] = ()) -> Rows:
    """All texts of a file with their labels, and with the other ``fields`` named.

    Raises:
        TextError: no such file, not readable, no such field, or an entry without text or label.
    """
    table = _table(file.path)
    for field in (file.text, file.label, *fields):
        if field not in table.column_names:
            raise TextError(
                f"{file.path} has no field {field!r}; {nearest(field, table.column_names)} "
                f"Write {file.path.name}:text=FIELD,label=FIELD"
            )
    texts, labels = (table.column(field).to_pylist() for field in (file.text, file.label))
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        if not isinstance(text, str) or not text.strip() or label is None:
            raise TextError(f"{file.path} entry {number} has no {file.text!r} or no {file.label!r}; correct or drop it")
    others = {field: [str(value) for value in table.column(field).to_pylist()] for field in fields}
    return Rows(texts, [str(label) for label in labels], others)


def _table(path: Path) -> Any:
    """A pyarrow table of a file."""
    import pyarrow
    from pyarrow import csv, json, parquet

    kind = (path.with_suffix("") if path.suffix == ".gz" else path).suffix
    if kind not in SUFFIXES:
        raise TextError(f"{path} ends in {kind or 'nothing'}, not in {', '.join(SUFFIXES)}; convert or rename it")
    if not path.is_file():
        raise TextError(f"there is no file {path}; check the path")
    try:
        if kind == ".parquet":
            return parquet.read_table(path)
        return (csv.read_csv if kind == ".csv" else json.read_json)(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise TextError(f"{path} is not readable as {kind[1:]}: {' '.join(str(error).split())}; correct it") from error
