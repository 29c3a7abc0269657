"""Documents to rows of equal length: no padding, no token lost but each split's last unfinished row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from saelab.activations.text import Document, is_held_out

Encode = Callable[[str], Sequence[int]]


class PackedRow(NamedTuple):
    """One row of the store. Position 0 is BOS; it carries the number of the document that follows it."""

    tokens: Int32[np.ndarray, " context"]
    doc: Int32[np.ndarray, " context"]
    held_out: bool


class _Unfinished(NamedTuple):
    """A split's tokens that do not fill a row yet, and the document of each."""

    tokens: list[int]
    docs: list[int]


def pack(
    documents: Iterable[Document],
    encode: Encode,
    *,
    context: int,
    bos_id: int,
    held_out: float,
    max_tokens: int,
    max_tokens_per_document: int | None = None,
) -> Iterator[PackedRow]:
    """Rows of ``context`` tokens in order of completion: BOS, then document after document, each split by itself.

    Documents are numbered from 0 in reading order, empty ones included. Reading stops as soon as ``max_tokens`` tokens
    (rows x context, BOS counted) are reached. ``encode`` turns a text into token ids without special tokens.
    """
    unfinished = {split: _Unfinished([], []) for split in (False, True)}
    n_left = max_tokens // context
    if n_left == 0:
        return
    for number, document in enumerate(documents):
        split = is_held_out(document.text, held_out)
        row = unfinished[split]
        tokens = encode(document.text)[:max_tokens_per_document]
        row.tokens.extend(tokens)
        row.docs.extend([number] * len(tokens))
        n_rows = min(len(row.tokens) // (context - 1), n_left)
        for start in range(0, n_rows * (context - 1), context - 1):
            stop = start + context - 1
            docs = row.docs[start:stop]
            yield PackedRow(_int32([bos_id, *row.tokens[start:stop]]), _int32([docs[0], *docs]), split)
        del row.tokens[: n_rows * (context - 1)], row.docs[: n_rows * (context - 1)]
        n_left -= n_rows
        if n_left == 0:
            return


def _int32(values: Sequence[int]) -> Int32[np.ndarray, " context"]:
    return np.array(values, dtype=np.int32)
