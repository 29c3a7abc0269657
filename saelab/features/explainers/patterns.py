"""Regular expressions on the token's own characters: words whatever their case, endings, beginnings, shapes.

A pattern matches a whole token (``re.fullmatch``) and, in one family, the token before it as well. Patterns of one
family are disjoint by construction, so that the best set of them is found exactly; put together they are one
expression, and matching it says the same as looking the tokens up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Int

from saelab.features.explainers.items import Family, ItemExplainer
from saelab.features.explainers.text import Text

_SPACE = " \t\n\r\f\v"  # what \s means in ASCII mode

#: A piece of a token as a pattern, or None where the family says nothing of the token.
Piece = Callable[[str], str | None]

_CLASSES = (("[A-Z]", re.compile("[A-Z]")), ("[a-z]", re.compile("[a-z]")), ("[0-9]", re.compile("[0-9]")))
_LETTER = re.compile(r"[^\W\d_A-Za-z]")


def patterns(text: Text) -> ItemExplainer:
    """The token matches this regular expression, or it and the one before match these."""
    pieces: tuple[tuple[Piece, str], ...] = (
        (word, r"(?ia)\s*(?:{})\s*"),
        (lambda token: ending(token, 3), r"(?ia)\s*[a-z]+(?:{})"),
        (lambda token: ending(token, 2), r"(?ia)\s*[a-z]+(?:{})"),
        (lambda token: beginning(token, 3), r"(?ia)\s*(?:{})[a-z]+"),
        (shape, "{}"),
    )
    families = [pattern_family(text, piece, template) for piece, template in pieces]
    return ItemExplainer("regex", [*families, shape_pairs(text)], text)


def word(token: str) -> str | None:
    """The token in lower case without the space around it, if it is ASCII."""
    bare = token.strip(_SPACE).lower()
    return _escaped(bare) if bare and token.isascii() else None


def ending(token: str, n: int) -> str | None:
    """Its last ``n`` letters, if letters of ASCII are all it has behind its space, and more than ``n``."""
    bare = token.lstrip(_SPACE).lower()
    return bare[-n:] if len(bare) > n and bare.isascii() and bare.isalpha() else None


def beginning(token: str, n: int) -> str | None:
    """Its first ``n`` letters, likewise."""
    bare = token.lstrip(_SPACE).lower()
    return bare[:n] if len(bare) > n and bare.isascii() and bare.isalpha() else None


def shape(token: str) -> str | None:
    """The pattern that all tokens match which are built like this one: `` [A-Z][a-z]+``, ``[0-9]{4}``, ``\\.``.

    Neighbouring runs are of different classes, so a token matches the pattern of its own shape and no other.
    """
    if not token:
        return None
    pieces = []
    for kind, run in groupby(token, _class_of):
        n = len(list(run))
        if kind == "[0-9]":
            pieces.append(kind if n == 1 else f"{kind}{{{n}}}")
        elif kind in ("[a-z]", _LETTER.pattern):
            pieces.append(f"{kind}+")
        else:
            pieces.append(kind if n == 1 else f"{kind}{{2,}}")
    return "".join(pieces)


def pattern_family(text: Text, piece: Piece, template: str) -> Family:
    """The ``piece`` of the token; ``template`` holds the alternatives of a rule at its braces."""
    pieces, number = _pieces_of(text.vocabulary, piece)
    members = _members(number)

    def describe(meanings: Sequence[Sequence[int]]) -> str:
        return f"/{template.format('|'.join(pieces[i] for (i,) in meanings))}/"

    def named(meanings: Sequence[Sequence[int]]) -> tuple[int, ...]:
        return tuple(t for (i,) in meanings for t in members[i]) if piece is word else ()

    item = number[text.tokens.reshape(-1)]
    meaning = np.arange(-1, len(pieces))[:, None]
    return Family(item + 1, meaning, describe, named)


def shape_pairs(text: Text) -> Family:
    """The shape of the token before, and that of the token."""
    pieces, number = _pieces_of(text.vocabulary, shape)
    before, here = text.before(1), number[text.tokens.reshape(-1)]
    previous = np.where(before < 0, -1, number[before])
    usable = (previous >= 0) & (here >= 0)
    keys = np.where(usable, previous.astype(np.int64) * len(pieces) + here, -1)
    known, item = np.unique(keys, return_inverse=True)
    meaning = np.where(known[:, None] < 0, -1, np.stack([known // len(pieces), known % len(pieces)], 1))

    def describe(meanings: Sequence[Sequence[int]]) -> str:
        return " or ".join(f"/{pieces[b]}/ after /{pieces[a]}/" for a, b in meanings)

    return Family(item.reshape(-1), meaning, describe, lambda meanings: ())


def _class_of(character: str) -> str:
    for name, pattern in _CLASSES:
        if pattern.fullmatch(character):
            return name
    return _LETTER.pattern if _LETTER.fullmatch(character) else _escaped(character)


def _escaped(characters: str) -> str:
    """As a pattern, with a space left readable."""
    return re.escape(characters).replace("\\ ", " ").replace("\\\n", "\\n").replace("\\\t", "\\t")


def _pieces_of(vocabulary: Sequence[str], piece: Piece) -> tuple[list[str], Int[np.ndarray, " d_vocab"]]:
    """The distinct pieces, and the number of each token's; -1 where it has none."""
    numbers: dict[str, int] = {}
    number = np.full(len(vocabulary), -1, np.int64)
    for token, spelling in enumerate(vocabulary):
        found = piece(spelling)
        if found is not None:
            number[token] = numbers.setdefault(found, len(numbers))
    return list(numbers), number


def _members(number: Int[np.ndarray, " d_vocab"]) -> list[list[int]]:
    """The tokens of each piece."""
    members: list[list[int]] = [[] for _ in range(int(number.max(initial=-1)) + 1)]
    for token, piece in enumerate(number.tolist()):
        if piece >= 0:
            members[piece].append(token)
    return members
