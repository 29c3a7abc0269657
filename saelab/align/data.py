"""Which records train and which are held out, read, encoded and counted before anything trains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from saelab.align.encoding import (
    Codec,
    Encoded,
    EncodedPair,
    LengthReport,
    encode_completions,
    encode_pairs,
    encode_questions,
)
from saelab.align.records import (
    Fault,
    Prompt,
    Reading,
    read_demonstrations,
    read_labelled,
    read_preferences,
    read_questions,
)
from saelab.errors import ConfigError, TextError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    train: str
    """File of records (.jsonl, .jsonl.gz, .json, .parquet), or hf://owner/name:split."""
    held_out: str | None = None
    """File of records that are only measured. Off: a share of the training file."""
    held_out_share: float = 0.1
    """Share of the prompts that is held out, chosen by a hash of the prompt, so that it is the same in every run."""
    limit: int | None = None
    """Use only so many training records, the first ones."""
    held_out_limit: int | None = 400
    """Measure on only so many."""
    on_fault: Literal["raise", "skip"] = "raise"
    """What to do about records that cannot be used: stop with their lines, or count them and go on."""

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 1:
            raise ConfigError(f"data.held_out_share must lie between 0 and 1, got {self.held_out_share}; 0.1 is usual")
        for name in ("limit", "held_out_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {value}; raise it or leave it out")


@dataclass(frozen=True)
class Split(Generic[T]):
    """Encoded records, and what became of the others."""

    train: list[T]
    held_out: list[T]
    lengths: LengthReport
    """Of the training records."""
    faults: list[Fault]
    """Records left out, of both files."""


def load_pairs(config: DataConfig, codec: Codec) -> Split[EncodedPair]:
    """Preference pairs.

    Raises:
        TextError: a file cannot be read, holds faulty records that ``config`` does not allow, or too few good ones.
    """
    return _load(config, read_preferences, lambda r: encode_pairs(r, codec), lambda pair: list(pair))


def load_demonstrations(config: DataConfig, codec: Codec) -> Split[Encoded]:
    """Prompts with an answer to imitate; raises as ``load_pairs``."""
    return _load(config, read_demonstrations, lambda r: encode_completions(r, codec), lambda sequence: [sequence])


def load_labelled(config: DataConfig, codec: Codec) -> Split[tuple[Encoded, bool]]:
    """Answers with their label, True for a good one; raises as ``load_pairs``."""
    return _load(config, read_labelled, lambda r: _labelled(r, codec), lambda item: [item[0]])


def load_questions(config: DataConfig, codec: Codec, *, n_new_tokens: int) -> Split[tuple[int, ...]]:
    """Prompts that the policy answers itself; raises as ``load_pairs``."""
    return _load(
        config,
        read_questions,
        lambda r: encode_questions(r, codec, n_new_tokens=n_new_tokens),
        lambda ids: [Encoded(ids, (), truncated=False)],
    )


def is_held_out(prompt: Prompt, *, share: float) -> bool:
    """Whether a prompt is held out: by its text alone, so that it never trains in another run either."""
    digest = hashlib.sha256(repr(prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _labelled(reading: Reading[Any], codec: Codec) -> Reading[Any]:
    encoded = encode_completions(reading, codec)
    label_of = dict(zip(reading.lines, (record.label for record in reading.records), strict=True))
    items = [(item, label_of[line]) for line, item in zip(encoded.lines, encoded.records, strict=True)]
    return Reading(encoded.source, items, encoded.lines, encoded.faults)


def _load(
    config: DataConfig,
    read: Callable[[str], Reading[Any]],
    encode: Callable[[Reading[Any]], Reading[Any]],
    sequences: Callable[[Any], list[Encoded]],
) -> Split[Any]:
    reading = read(config.train)
    if config.held_out is not None:
        training, held_out = reading, read(config.held_out)
    else:
        training, held_out = _divided(reading, config.held_out_share)
    train, train_faults = _usable(encode(_first(training, config.limit)), config)
    kept, kept_faults = _usable(encode(_first(held_out, config.held_out_limit)), config)
    if not train or not kept:
        raise TextError(
            f"{config.train} leaves {len(train)} records to train on and {len(kept)} held out; both need some: give "
            "more records, or a file with data.held_out"
        )
    report = LengthReport.of([sequence for item in train for sequence in sequences(item)])
    return Split(train, kept, report, train_faults + kept_faults)


def _divided(reading: Reading[Any], share: float) -> tuple[Reading[Any], Reading[Any]]:
    out = [is_held_out(record.prompt, share=share) for record in reading.records]

    def part(wanted: bool, faults: Sequence[Fault]) -> Reading[Any]:
        chosen = [i for i, is_out in enumerate(out) if is_out == wanted]
        records, lines = [reading.records[i] for i in chosen], [reading.lines[i] for i in chosen]
        return Reading(reading.source, records, lines, list(faults))

    return part(False, reading.faults), part(True, ())


def _first(reading: Reading[Any], limit: int | None) -> Reading[Any]:
    return Reading(reading.source, reading.records[:limit], reading.lines[:limit], reading.faults)


def _usable(reading: Reading[Any], config: DataConfig) -> tuple[list[Any], list[Fault]]:
    return (reading.required(), []) if config.on_fault == "raise" else (reading.records, reading.faults)
