"""Shuffled batches without a disk: the model reads the text while the SAE trains."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from saelab.activations.capture import read_activations
from saelab.activations.moments import ActivationStats, moments, norm_limit
from saelab.activations.packing import PackedRow
from saelab.activations.permutation import mixed_key, permuted
from saelab.activations.prefetch import Prefetcher
from saelab.activations.rows import rows_of, stacked
from saelab.activations.settings import CacheConfig
from saelab.activations.text import open_text
from saelab.errors import ConfigError, TextError
from saelab.models.load import Model


class LiveBatches:
    """The training tokens of ``config``'s text at one hook, captured chunk by chunk and shuffled within each chunk.

    Chunk j is rows [j, j + 1) * chunk_rows of the training rows, repeated without end; the shuffle reaches no further,
    so chunks should hold many batches. Batch ``step`` is a function of the step alone, but asking for steps in
    increasing order captures each chunk once; going back captures again. Outliers (see `SlotBatches`) are replaced by
    tokens from elsewhere in the chunk, so that every chunk has as many tokens as any other.

    With ``n_steps``, the number of steps that will be asked for, the next chunk is captured while the caller works on
    this one, and none beyond the last: two chunks are then held in memory.

    Raises:
        ConfigError: no such hook, or a batch larger than a chunk.
    """

    def __init__(
        self,
        model: Model,
        config: CacheConfig,
        hook_name: str,
        *,
        batch_size: int,
        seed: int,
        chunk_rows: int = 1024,
        outlier_factor: float | None = 10.0,
        n_steps: int | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.hook_name = model.check_hook(hook_name)
        self.batch_size = batch_size
        self.seed = seed
        self.chunk_rows = chunk_rows
        self.outlier_factor = outlier_factor
        if not 1 <= batch_size <= self._chunk_tokens:
            raise ConfigError(
                f"batch_size must be between 1 and the {self._chunk_tokens:,} tokens of a chunk, got {batch_size}; "
                "lower it or raise chunk_rows"
            )
        self.n_outliers = 0
        self._n_tokens: int | None = None
        self.stall_s = 0.0
        """Seconds that callers of ``at`` have waited for the model so far."""
        self._last_chunk = -1 if n_steps is None else (n_steps * batch_size - 1) // self._chunk_tokens
        self._chunks = Prefetcher(self._captured)
        self._chunk_number = -1
        self._chunk = torch.empty(0, self.d_in)
        self._closed = threading.Event()
        self._rows: Iterator[PackedRow] = iter(())
        self._next_row = 0

    @property
    def d_in(self) -> int:
        return self.model.hook_width(self.hook_name)

    @property
    def n_tokens(self) -> int:
        """Training tokens in one pass over the text, BOS not counted. The first call reads and tokenizes all of it."""
        if self._n_tokens is None:
            self._n_tokens = sum(1 for _ in self._training_rows()) * (self.config.context - 1)
        return self._n_tokens

    def at(self, step: int) -> Float32[Tensor, "batch d_in"]:
        """The batch of ``step`` (from 0).

        Raises:
            TextError: the text has no training row.
        """
        sequence = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        chunks, index = np.divmod(sequence, self._chunk_tokens)
        parts, began = [], time.perf_counter()
        for number in np.unique(chunks):
            acts = self._at_hand(int(number))
            order = permuted(index[chunks == number], self._chunk_tokens, mixed_key(self.seed, int(number)))
            parts.append(acts[torch.from_numpy(order % len(acts))])
        self.stall_s += time.perf_counter() - began
        return torch.cat(parts)

    def statistics(self, max_tokens: int | None = None) -> ActivationStats:
        """Statistics over the first chunks that hold ``max_tokens`` (default: the first), BOS and outliers left out."""
        n_chunks = 1 if max_tokens is None else max(1, -(-max_tokens // self._chunk_tokens))
        # backwards, so that the first chunk is still at hand when training begins
        return moments(self._at_hand(number) for number in reversed(range(n_chunks)))

    def close(self) -> None:
        """Stop capturing ahead, at the next forward pass; the end of the process waits for that."""
        self._closed.set()

    @property
    def _chunk_tokens(self) -> int:
        return self.chunk_rows * (self.config.context - 1)

    def _at_hand(self, number: int) -> Float32[Tensor, "tokens d_in"]:
        """The tokens of a chunk, BOS and outliers left out; the last one asked for is kept."""
        if number != self._chunk_number:
            self._chunk = self._chunks.get(number, ahead=number < self._last_chunk)
            self._chunk_number = number
            self.n_outliers = self._chunk_tokens - len(self._chunk)
        return self._chunk

    def _captured(self, number: int) -> Float32[Tensor, "tokens d_in"]:
        """A chunk from the model; in the background, so nothing here may change what callers see."""
        rows = stacked(list(self._rows_of_chunk(number)))
        acts = read_activations(
            self.model,
            rows.tokens,
            [self.hook_name],
            batch_rows=self.config.batch_rows,
            dtype=torch.float32,
            progress=self._go_on,
        )[self.hook_name]
        tokens = acts[:, 1:].flatten(0, 1)
        if self.outlier_factor is not None:
            norms = tokens.norm(dim=1)
            tokens = tokens[norms <= norm_limit(norms, outlier_factor=self.outlier_factor)]
        return tokens

    def _go_on(self, n_tokens: int) -> None:
        if self._closed.is_set():
            raise CancelledError

    def _rows_of_chunk(self, number: int) -> Iterator[PackedRow]:
        start = number * self.chunk_rows
        if start < self._next_row or self._next_row == 0:
            self._rows, self._next_row = self._endless_rows(), 0
        skipped = start - self._next_row
        self._next_row = start + self.chunk_rows
        return itertools.islice(self._rows, skipped, skipped + self.chunk_rows)

    def _endless_rows(self) -> Iterator[PackedRow]:
        while True:
            n_rows = 0
            for row in self._training_rows():
                n_rows += 1
                yield row
            if n_rows == 0:
                source, context = self.config.text.source, self.config.context
                raise TextError(f"the text {source!r} gives no training row of context={context}; give more text")

    def _training_rows(self) -> Iterator[PackedRow]:
        return (row for row in rows_of(open_text(self.config.text), self.model, self.config) if not row.held_out)
