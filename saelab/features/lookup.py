"""Search an index without a model: by the tokens that features fire on, and by the words of their labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from saelab.errors import TextError, nearest
from saelab.features.records import SearchHit

if TYPE_CHECKING:
    from saelab.features.index import FeatureIndex

_WORD = re.compile(r"\w+|[^\w\s]")

#: What a label that names the word counts, where it has no F1 of its own ("promotes ...").
_UNSCORED = 0.1


class TokenMatch(NamedTuple):
    """How well "one of these tokens" describes each feature."""

    f1: Float[np.ndarray, " features"]
    share: Float[np.ndarray, " features"]
    """Of the tokens' occurrences, those on which the feature fires."""


def by_token(index: FeatureIndex, token: str | int, *, n: int) -> list[SearchHit]:
    """Features most specific to a token: the F1 of "clearly fires exactly on this token", over all indexed tokens."""
    ids = token_ids(index, token)
    match = token_match(index, ids)
    shown = index.vocabulary[ids[0]]
    return _hits(index, match.f1, n, lambda i: f'fires on {match.share[i]:.0%} of "{shown}"')


def by_text(index: FeatureIndex, text: str, *, n: int) -> list[SearchHit]:
    """Features ranked by the sum, over the words of ``text``, of how well each describes the word, rare words first.

    A word counts for a feature with the F1 of "clearly fires exactly on this word" (divided by the number of tokens
    that spell it), or, where the label names the word, with the label's own held-out F1 if that is larger. Words
    weigh by ln(tokens / occurrences), as search engines weigh them (inverse document frequency, Sparck Jones 1972).
    """
    words = list(dict.fromkeys(word.casefold() for word in _WORD.findall(text)))
    if not words:
        raise TextError(f"there is no word in {text!r}; type at least one")
    label_words = [frozenset(_WORD.findall(label.casefold())) for label in index.column("label")]
    label_f1 = np.nan_to_num(index.column("label_f1"), nan=_UNSCORED)
    scores = np.zeros((len(words), index.n_features))
    for row, word in zip(scores, words, strict=True):
        pieces = _pieces(word, index.spellings)
        for piece in pieces:
            np.maximum(row, token_match(index, index.spellings[piece]).f1 / len(pieces), out=row)
        named = np.fromiter((word in label for label in label_words), bool, index.n_features)
        np.maximum(row, np.where(named, label_f1, 0), out=row)
        row *= _rarity(index, index.spellings.get(word, []))
    best = scores.argmax(0)
    return _hits(index, scores.sum(0), n, lambda i: f'matches "{words[best[i]]}"')


def token_match(index: FeatureIndex, ids: Sequence[int]) -> TokenMatch:
    """Score "one of these tokens" for every feature as labels are scored, but on all indexed tokens.

    Counts come from the tokens that the index keeps of each feature: one that is not among them counts as never.
    """
    counts = index.token_counts
    here = np.isin(counts.token_ids, ids)
    n_fired, n_clear = np.where(here, counts.n_fired, 0).sum(1), np.where(here, counts.n_clear, 0).sum(1)
    occurrences = counts.n_occurrences[list(ids)].sum()
    scored = occurrences - n_fired + n_clear
    return TokenMatch(
        f1=2 * n_clear / np.maximum(index.column("n_clear") + scored, 1),
        share=n_fired / np.maximum(occurrences, 1),
    )


def token_ids(index: FeatureIndex, token: str | int) -> list[int]:
    """Ids that ``token`` means: itself, else tokens spelled exactly so, else regardless of case and surrounding space.

    Raises:
        TextError: the vocabulary has no such token.
    """
    if isinstance(token, int):
        if not 0 <= token < len(index.vocabulary):
            raise TextError(f"there is no token {token}; the vocabulary holds 0 to {len(index.vocabulary) - 1}")
        return [token]
    plain = token.strip().casefold()
    same = index.spellings.get(plain, [])
    if not same:
        raise TextError(f"no token of the vocabulary is {token!r}; {nearest(plain, index.spellings)}")
    return [i for i in same if index.vocabulary[i] == token] or same


def _rarity(index: FeatureIndex, ids: Sequence[int]) -> float:
    """1 for tokens that occur once at most, 0 for tokens that are the whole text."""
    occurrences = int(index.token_counts.n_occurrences[list(ids)].sum())
    return 1 - float(np.log(max(occurrences, 1)) / np.log(max(index.n_tokens, 2)))


def _hits(
    index: FeatureIndex, scores: Float[np.ndarray, " features"], n: int, why: Callable[[int], str]
) -> list[SearchHit]:
    order = [int(i) for i in np.argsort(-scores, kind="stable")[:n] if scores[i] > 0]
    labels, density = index.column("label"), index.column("density")
    return [SearchHit(i, float(scores[i]), labels[i], float(density[i]), why(i)) for i in order]


def _pieces(word: str, spellings: dict[str, list[int]]) -> list[str]:
    """The word itself if it is a token, else the longest tokens that spell it from the left."""
    pieces = []
    while word:
        length = next((end for end in range(len(word), 0, -1) if word[:end] in spellings), 0)
        if length:
            pieces.append(word[:length])
        word = word[max(length, 1) :]
    return pieces
