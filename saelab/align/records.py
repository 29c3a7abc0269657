"""Preference data as it lies in files, read into four kinds of record. Nothing is dropped in silence."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from saelab.errors import TextError, nearest


class Message(NamedTuple):
    role: str
    """system, user or assistant."""
    content: str


#: Plain text that the completion continues, or the turns of a conversation before the answer.
Prompt = str | tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Preference:
    """Two answers to a prompt, of which a person or a model prefers the first."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One answer, called good or bad."""

    prompt: Prompt
    completion: str
    label: bool


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One answer to imitate."""

    prompt: Prompt
    completion: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt that the policy answers itself."""

    prompt: Prompt


R = TypeVar("R")


class Fault(NamedTuple):
    """Why a record cannot be used."""

    line: int
    """Counted from 1."""
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True)
class Reading(Generic[R]):
    """All records of a source that can be used, each with its line, and the faults of the others."""

    source: str
    records: list[R]
    lines: list[int]
    faults: list[Fault] = field(default_factory=list)

    def required(self) -> list[R]:
        """The records, if there is no fault.

        Raises:
            TextError: names the faults with their lines; nothing has trained yet.
        """
        if self.faults:
            shown = "; ".join(map(str, self.faults[:5])) + ("; ..." if self.faults[5:] else "")
            raise TextError(
                f"{self.source} has {len(self.faults)} records that cannot be used ({shown}); correct them, or leave "
                "them out with --set data.on_fault=skip"
            )
        return self.records


#: Other names under which data sets in use keep the same thing.
_SYNONYMS = {
    "prompt": ("prompt", "instruction", "question"),
    "completion": ("completion", "response", "output", "answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "label": ("label",),
}
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def read_preferences(source: str | os.PathLike[str]) -> Reading[Preference]:
    """Records with prompt, chosen and rejected; without a prompt where the two are conversations with a common start.

    A conversation is a list of ``{"role", "content"}`` or a transcript in the form of HH-RLHF ("\\n\\nHuman: ...").

    Raises:
        TextError: there is no such file, it does not parse, or it holds no record.
    """
    return _read(source, _preference)


def read_labelled(source: str | os.PathLike[str]) -> Reading[Labelled]:
    """Records with prompt, completion and a label that is true or false."""
    return _read(source, _labelled)


def read_demonstrations(source: str | os.PathLike[str]) -> Reading[Demonstration]:
    """Records with prompt and completion, or with ``messages`` of which the last is the assistant's."""
    return _read(source, _demonstration)


def read_questions(source: str | os.PathLike[str]) -> Reading[Question]:
    """Records with a prompt, or lines that are one; what else they hold is not read."""
    return _read(source, lambda row: Question(prompt=_prompt_of(row)), plain_text="prompt")


class _Fault(Exception):
    """A record that cannot be used; its text is the reason."""


def _read(source: str | os.PathLike[str], parse: Any, *, plain_text: str | None = None) -> Reading[Any]:
    """With ``plain_text`` a row may be a string, which is then the field of that name."""
    records, lines, faults = [], [], []
    for line, row in rows_of(source):
        if plain_text and isinstance(row, str):
            row = {plain_text: row}
        try:
            if not isinstance(row, Mapping):
                raise _Fault(f"it is {json.dumps(row)[:60]}, not an object with named fields")
            records.append(parse(row))
            lines.append(line)
        except _Fault as fault:
            faults.append(Fault(line, str(fault)))
    if not records and not faults:
        raise TextError(f"{source} holds no records; give JSONL with one object a line, or Parquet")
    return Reading(os.fspath(source), records, lines, faults)


def rows_of(source: str | os.PathLike[str]) -> Iterator[tuple[int, Any]]:
    """(line, row) of JSONL (also .gz), of a JSON list, of Parquet, or of a data set on the Hugging Face hub.

    A hub data set is written ``hf://owner/name`` or ``hf://owner/name:split``.

    Raises:
        TextError: missing, not UTF-8, or not readable as its ending says.
    """
    name = os.fspath(source)
    if name.startswith("hf://"):
        return _rows_of_hub(name.removeprefix("hf://"))
    path = Path(name)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise TextError(f"there is no file {path}; {nearest(path.name, siblings) if siblings else 'check the path'}")
    kinds = {".jsonl": _rows_of_lines, ".json": _rows_of_list, ".parquet": _rows_of_parquet}
    kind = Path(name.removesuffix(".gz")).suffix
    if kind not in kinds or path.is_dir():
        raise TextError(f"{path} is none of {', '.join(kinds)} (the first also as .gz); convert it")
    return kinds[kind](path)


def _text_of(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            yield from stream
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 ({error.reason}); convert it") from error
    except (OSError, EOFError) as error:
        raise TextError(f"{path} cannot be read ({error}); copy it again") from error


def _rows_of_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_text_of(path), start=1):
        if line.strip():
            yield number, _parsed(line, f"line {number} of {path}")


def _rows_of_list(path: Path) -> Iterator[tuple[int, Any]]:
    rows = _parsed("".join(_text_of(path)), str(path))
    if not isinstance(rows, list):
        raise TextError(f"{path} must hold a list of records; one object a line belongs into a .jsonl file")
    yield from enumerate(rows, start=1)


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise TextError(f"{what} is not JSON ({error}); correct it") from error


def _rows_of_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise TextError(f"{path} is not readable as Parquet ({error}); copy it again") from error
    yield from enumerate(table.to_pylist(), start=1)


def _rows_of_hub(name: str) -> Iterator[tuple[int, Any]]:
    import datasets

    name, _, split = name.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TextError(f"the data set {name} cannot be loaded from the hub ({reason}); check its name") from error
    yield from enumerate(rows, start=1)


def _preference(row: Mapping[str, Any]) -> Preference:
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if _given(row, "prompt"):
        prompt = _prompt_of(row)
        record = Preference(prompt=prompt, chosen=_answer(chosen, "chosen"), rejected=_answer(rejected, "rejected"))
    else:
        record = _from_transcripts(_turns(chosen, "chosen"), _turns(rejected, "rejected"))
    if record.chosen == record.rejected:
        raise _Fault("chosen and rejected are the same, so there is nothing to prefer")
    return record


def _from_transcripts(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Preference:
    if chosen[:-1] != rejected[:-1]:
        raise _Fault("chosen and rejected differ before the last turn, so they do not answer the same prompt")
    answers = []
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[-1].role != "assistant":
            raise _Fault(f"{name} ends with a turn of {turns[-1].role}, not with the assistant's answer")
        answers.append(_nonempty(turns[-1].content, name))
    if len(chosen) < 2:
        raise _Fault("chosen holds an answer but no prompt")
    return Preference(prompt=chosen[:-1], chosen=answers[0], rejected=answers[1])


def _labelled(row: Mapping[str, Any]) -> Labelled:
    label = _field(row, "label")
    if label not in (True, False):
        raise _Fault(f"label is {label!r}, but must be true or false")
    return Labelled(
        prompt=_prompt_of(row),
        completion=_answer(_field(row, "completion"), "completion"),
        label=bool(label),
    )


def _demonstration(row: Mapping[str, Any]) -> Demonstration:
    if "messages" in row:
        turns = _turns(row["messages"], "messages")
        if turns[-1].role != "assistant" or len(turns) < 2:
            raise _Fault("messages must end with the assistant's answer to an earlier turn")
        return Demonstration(prompt=turns[:-1], completion=_nonempty(turns[-1].content, "messages"))
    return Demonstration(prompt=_prompt_of(row), completion=_answer(_field(row, "completion"), "completion"))


def _field(row: Mapping[str, Any], name: str) -> Any:
    for synonym in _SYNONYMS[name]:
        if row.get(synonym) is not None:
            return row[synonym]
    raise _Fault(f"it has no {name}, only {', '.join(map(str, row)) or 'nothing'}")


def _prompt_of(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a record; an instruction may have the material that it is about in a field of its own."""
    prompt, material = _prompt(_field(row, "prompt")), row.get("input")
    if isinstance(prompt, str) and "instruction" in row and isinstance(material, str) and material.strip():
        return f"{prompt}\n\n{material}"
    return prompt


def _given(row: Mapping[str, Any], name: str) -> bool:
    return any(row.get(synonym) is not None for synonym in _SYNONYMS[name])


def _prompt(value: Any) -> Prompt:
    if isinstance(value, str) and value.startswith(_HUMAN):
        return _transcript(value.removesuffix(_ASSISTANT))
    if isinstance(value, str):
        return value
    turns = _turns(value, "prompt")
    if turns[-1].role == "assistant":
        raise _Fault("prompt ends with a turn of the assistant, so there is nothing to answer")
    return turns


def _answer(value: Any, name: str) -> str:
    """A completion: a string, or the one assistant turn of a list."""
    if isinstance(value, str):
        return _nonempty(value, name)
    turns = _turns(value, name)
    if len(turns) != 1 or turns[0].role != "assistant":
        raise _Fault(f"{name} must be a string or one turn of the assistant, as the prompt stands apart")
    return _nonempty(turns[0].content, name)


def _nonempty(text: str, name: str) -> str:
    if not text.strip():
        raise _Fault(f"{name} is empty")
    return text


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    if isinstance(value, str) and value.startswith(_HUMAN):
        return _transcript(value)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _Fault(f"{name} is neither a list of turns nor a transcript, and there is no prompt beside it")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise _Fault(f"a turn of {name} lacks role or content")
        turns.append(Message(turn["role"], turn["content"]))
    return tuple(turns)


def _transcript(text: str) -> tuple[Message, ...]:
    """Turns of a text in the form of HH-RLHF, where each begins with "\\n\\nHuman:" or "\\n\\nAssistant:"."""
    turns = []
    for part in text.replace(_HUMAN, "\0user\1").replace(_ASSISTANT, "\0assistant\1").split("\0")[1:]:
        role, _, content = part.partition("\1")
        turns.append(Message(role, content.strip()))
    return tuple(turns)
