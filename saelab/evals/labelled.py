"""Texts with labels, for probes: local files only, nothing is bundled and nothing is downloaded.

Any .jsonl, .csv (both also with .gz) or .parquet file with a field of text and a field of labels will do:

    SST-2              {"text": "a stirring , funny ...", "label": 1}                    text, label
    true-false         {"set": "cities", "statement": "The city of ...", "label": 1}     statement, label
    emotions           {"emotion": "anger", "text": "Someone takes credit ..."}          text, emotion
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

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


class Labelled(NamedTuple):
    """A part of a data set with as many texts of each class as of any other."""

    name: str
    texts: list[str]
    labels: list[str]


class Task(NamedTuple):
    """One class against the others: as many texts of it as of all others together, cut into two halves to train and to
    test."""

    name: str
    train: Int[np.ndarray, " n"]  # numbers of texts
    test: Int[np.ndarray, " m"]
    positive: frozenset[int]


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


def read(file: LabelledFile, *, max_texts: int, max_classes: int, seed: int) -> Labelled:
    """At most ``max_texts`` texts of the ``max_classes`` most frequent classes, as many of each, chosen by ``seed``.

    Raises:
        TextError: no such file, not readable, no such field, an entry without text or label, or fewer than two classes
            with at least 4 texts.
    """
    texts, labels = _columns(file)
    frequent = [label for label, count in Counter(labels).most_common(max_classes) if count >= 4]
    if len(frequent) < 2:
        raise TextError(
            f"{file.path} has fewer than two values of {file.label!r} with at least 4 texts, so there is nothing to "
            f"tell apart; name the field of the class with :label=FIELD"
        )
    counts = Counter(labels)
    n_each = min(max_texts // len(frequent), *(counts[label] for label in frequent))
    if n_each < 4:
        raise TextError(
            f"{max_texts} texts are fewer than 4 of each of {len(frequent)} classes of {file.path}; raise probing.texts"
        )
    rng = np.random.default_rng(seed)
    of_class = {label: np.array([i for i, found in enumerate(labels) if found == label]) for label in sorted(frequent)}
    chosen = np.concatenate([rng.permutation(numbers)[:n_each] for numbers in of_class.values()])
    return Labelled(file.name, [texts[i] for i in chosen], [labels[i] for i in chosen])


def tasks(data: Labelled, *, seed: int) -> list[Task]:
    """Each class against the others; of two classes one task, for the second of them in alphabetical order."""
    classes = sorted(set(data.labels))
    rng = np.random.default_rng(seed)
    made = []
    for positive_class in classes if len(classes) > 2 else classes[1:]:
        is_positive = np.array([label == positive_class for label in data.labels])
        positive, others = (rng.permutation(np.flatnonzero(side)) for side in (is_positive, ~is_positive))
        n = min(len(positive), len(others))
        half = n // 2
        name = data.name if len(classes) == 2 else f"{data.name}: {positive_class}"
        made.append(
            Task(
                name,
                np.concatenate([positive[:half], others[:half]]),
                np.concatenate([positive[half:n], others[half:n]]),
                frozenset(positive.tolist()),
            )
        )
    return made


def _columns(file: LabelledFile) -> tuple[list[str], list[str]]:
    table = _table(file.path)
    for field in (file.text, file.label):
        if field not in table.column_names:
            raise TextError(
                f"{file.path} has no field {field!r}; {nearest(field, table.column_names)} "
                f"Write {file.path.name}:text=FIELD,label=FIELD"
            )
    texts, labels = (table.column(field).to_pylist() for field in (file.text, file.label))
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), start=1):
        if not isinstance(text, str) or not text.strip() or label is None:
            raise TextError(f"{file.path} entry {number} has no {file.text!r} or no {file.label!r}; correct or drop it")
    return texts, [str(label) for label in labels]


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
