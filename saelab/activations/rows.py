"""The rows that a capture reads: made of text, or those of a store that another model has read."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from saelab.activations.packing import PackedRow, pack
from saelab.activations.settings import CacheConfig
from saelab.activations.store import ActivationStore, DocumentRecord
from saelab.activations.text import Document, is_held_out, open_text
from saelab.models.load import Model


class Rows(NamedTuple):
    """Several packed rows as arrays."""

    tokens: Int32[np.ndarray, "rows seq"]
    doc: Int32[np.ndarray, "rows seq"]
    held_out: Bool[np.ndarray, " rows"]


class TextRows:
    """The rows that ``config`` makes of its text with the model's tokenizer.

    ``documents`` are those read so far: all of them, once ``shards`` is at its end.
    """

    def __init__(self, config: CacheConfig, model: Model) -> None:
        self._config = config
        self._model = model
        self.documents: list[DocumentRecord] = []

    def shards(self) -> Iterator[Rows]:
        """The rows of one shard after the other; the text is read as they are asked for."""
        rows = rows_of(self._noted(open_text(self._config.text)), self._model, self._config)
        while chunk := list(itertools.islice(rows, self._config.rows_per_shard)):
            yield stacked(chunk)

    def _noted(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents as they are; what is known of each is added to ``documents``."""
        for document in documents:
            digest = hashlib.sha256(document.text.encode()).hexdigest()
            held_out = is_held_out(document.text, self._config.held_out)
            self.documents.append(DocumentRecord(len(self.documents), document.title, held_out, digest))
            yield document


class StoreRows:
    """The rows of a store, shard by shard as they lie there, and its ``documents``."""

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        self.documents = list(store.documents)

    def shards(self) -> Iterator[Rows]:
        """The rows of one shard after the other."""
        held_out = np.isin(self._store.rows("all"), self._store.rows("held_out"))
        for start in range(0, self._store.n_rows, self._store.manifest.rows_per_shard):
            rows = self._store.rows("all")[start : start + self._store.manifest.rows_per_shard]
            tokens, doc = (part.int().numpy() for part in (self._store.tokens(rows), self._store.docs(rows)))
            yield Rows(tokens, doc, held_out[rows])


RowSource = TextRows | StoreRows


def rows_of(documents: Iterator[Document], model: Model, config: CacheConfig) -> Iterator[PackedRow]:
    """The rows that ``config`` makes of ``documents`` with the model's tokenizer."""
    return pack(
        documents,
        model.encode,
        context=config.context,
        bos_id=model.bos_id,
        held_out=config.held_out,
        max_tokens=config.tokens,
        max_tokens_per_document=config.text.max_tokens_per_document,
    )


def stacked(rows: Sequence[PackedRow]) -> Rows:
    """Rows as arrays."""
    tokens, doc = (np.stack([row[part] for row in rows]) for part in (0, 1))
    return Rows(tokens, doc, np.array([row.held_out for row in rows]))
