"""What a shallow tree may ask of a position: properties of the tokens around it, and of its place in the row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int, Shaped

from saelab.features.explainers.text import Text
from saelab.features.label import listed, quoted

#: How far back "shortly before" reaches, in tokens.
SHORTLY = 8

_ASKED: tuple[tuple[str, str], ...] = (
    ("begins with a space", r" [\s\S]*"),
    ("is capitalised", r"\s*[A-Z][a-z]*"),
    ("is in capitals", r"\s*[A-Z]{2,}"),
    ("is a number", r"\s*[0-9]+"),
    ("is a word", r"\s*[A-Za-z]+"),
    ("is part of a word", r"[A-Za-z]+"),
    ("is punctuation", r"\s*[^\w\s]+"),
    ("ends a sentence", r"\s*[.!?]+[\"')]*"),
    ("holds a line break", r"[\s\S]*\n[\s\S]*"),
    ("opens a bracket", r"[\s\S]*[(\[][^)\]]*"),
    ("holds a quotation mark", '[\\s\\S]*["\u201c\u201d][\\s\\S]*'),
)


@runtime_checkable
class Column(Protocol):
    """A number for every position, with what it means to be above or below a threshold."""

    def values(self, text: Text) -> Shaped[np.ndarray, " positions"]: ...

    def at(self, text: Text, positions: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]: ...

    def reads(self, vocabulary: Sequence[str], *, above: bool, threshold: float) -> str: ...


@dataclass(frozen=True, eq=False)
class Fixed:
    """The same for every feature, so it is computed once."""

    name: str
    numbers: Shaped[np.ndarray, " positions"]

    def values(self, text: Text) -> Shaped[np.ndarray, " positions"]:
        return self.numbers

    def at(self, text: Text, positions: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
        return self.numbers[positions]

    def reads(self, vocabulary: Sequence[str], *, above: bool, threshold: float) -> str:
        if self.numbers.dtype == bool:
            return self.name if above else f"not: {self.name}"
        return f"{self.name} {'above' if above else 'at most'} {np.floor(threshold):.0f}"


@dataclass(frozen=True, eq=False)
class TokenAt:
    """Whether the token ``offset`` places before is one of ``ids``."""

    offset: int
    ids: tuple[int, ...]

    def values(self, text: Text) -> Bool[np.ndarray, " positions"]:
        return self._member(text)[text.before(self.offset)]

    def at(self, text: Text, positions: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        inside = positions % text.context >= self.offset
        return inside & self._member(text)[text.tokens.reshape(-1)[positions - self.offset * inside]]

    def reads(self, vocabulary: Sequence[str], *, above: bool, threshold: float) -> str:
        tokens = listed([vocabulary[t] for t in self.ids])
        where = ("on", "after", "two after")[self.offset]
        return f"{where} {tokens}" if above else f"not {where} {tokens}"

    def _member(self, text: Text) -> Bool[np.ndarray, " d_vocab_plus_1"]:
        member = np.zeros(len(text.vocabulary) + 1, bool)  # the last answers for -1, outside the row
        member[list(self.ids)] = True
        return member


@dataclass(frozen=True, eq=False)
class Lately:
    """Whether ``token`` stands among the ``SHORTLY`` tokens before."""

    token: int

    def values(self, text: Text) -> Bool[np.ndarray, " positions"]:
        return _within(text.tokens == self.token, SHORTLY).reshape(-1)

    def at(self, text: Text, positions: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return (windows_before(text, positions) == self.token).any(1)

    def reads(self, vocabulary: Sequence[str], *, above: bool, threshold: float) -> str:
        return f"{'shortly' if above else 'not shortly'} after {quoted(vocabulary[self.token])}"


def fixed_columns(text: Text) -> list[Fixed]:
    """Properties of the token and of the two before it, and of the place: 39 of them."""
    columns = []
    for name, pattern in _ASKED:
        member = np.array([re.fullmatch(pattern, token) is not None for token in (*text.vocabulary, "")])
        for offset, whose in enumerate(("the token", "the token before", "the second token before")):
            columns.append(Fixed(f"{whose} {name}", member[text.before(offset)]))
    tokens = text.tokens
    breaks, opens, closes = (
        np.array([re.search(pattern, token) is not None for token in text.vocabulary])[tokens]
        for pattern in (r"\n", r"[(\[]", r"[)\]]")
    )
    columns += [
        Fixed("tokens since the beginning of the row", np.tile(np.arange(text.context, dtype=np.int16), len(tokens))),
        Fixed("tokens since the last line break", _since(breaks)),
        Fixed("the token stood earlier in the row", _seen_before(tokens)),
        Fixed("token and token before stood earlier in the row", _seen_before(_pairs(tokens, len(text.vocabulary)))),
        Fixed("a bracket is open", _open(opens, closes)),
        Fixed("the token repeats the one before", text.before(0) == text.before(1)),
    ]
    return columns


def windows_before(text: Text, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, "n shortly"]:
    """The ``SHORTLY`` tokens before each position, nearest first; -1 outside its row."""
    steps = np.arange(1, SHORTLY + 1)
    inside = (positions % text.context)[:, None] >= steps
    return np.where(inside, text.tokens.reshape(-1)[positions[:, None] - steps * inside], -1)


def _within(here: Bool[np.ndarray, "rows context"], n: int) -> Bool[np.ndarray, "rows context"]:
    """Whether any of the ``n`` places before is True."""
    context = here.shape[1]
    total = np.zeros((len(here), context + 1), np.int32)
    np.cumsum(here, axis=1, out=total[:, 1:])
    column = np.arange(context)
    return total[:, column] > total[:, np.maximum(column - n, 0)]


def _since(here: Bool[np.ndarray, "rows context"]) -> Int[np.ndarray, " positions"]:
    """Tokens since the last place that is True, itself included (0 there); since the row's beginning where none is."""
    column = np.arange(here.shape[1], dtype=np.int16)
    last = np.maximum.accumulate(np.where(here, column, np.int16(0)), axis=1)
    return (column - last).reshape(-1)


def _open(
    opens: Bool[np.ndarray, "rows context"], closes: Bool[np.ndarray, "rows context"]
) -> Bool[np.ndarray, " positions"]:
    """Whether a bracket opened in the row before the position and was not closed since."""
    column = np.arange(opens.shape[1])
    last_opened, last_closed = (np.maximum.accumulate(np.where(here, column, -1), axis=1) for here in (opens, closes))
    return ((last_opened > last_closed) & (last_opened < column)).reshape(-1)


def _seen_before(items: Int[np.ndarray, "rows context"]) -> Bool[np.ndarray, " positions"]:
    """Whether the same item stands earlier in its row."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, 1)
    repeated = np.zeros(items.shape, bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    seen = np.empty(items.shape, bool)
    np.put_along_axis(seen, order, repeated, 1)
    return seen.reshape(-1)


def _pairs(tokens: Int[np.ndarray, "rows context"], d_vocab: int) -> Int[np.ndarray, "rows context"]:
    """Each token and the one before it as one number; the first of a row with itself."""
    before = np.concatenate([tokens[:, :1], tokens[:, :-1]], 1).astype(np.int64)
    return before * d_vocab + tokens
