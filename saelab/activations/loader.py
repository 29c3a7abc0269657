"""Shuffled batches from a store. Each batch is a function of its step alone: no state to save or to lose."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from saelab.activations.live import LiveBatches
from saelab.activations.moments import ActivationStats, moments, norm_limit
from saelab.activations.permutation import mixed_key, permuted
from saelab.activations.store import ActivationStore, Split
from saelab.errors import ConfigError, TextError

__all__ = ["ActivationStats", "Batches", "LiveBatches", "permuted"]

_ROWS_PER_BLOCK = 64  # rows read at once by the passes over the whole store


class Batches:
    """Shuffled activations of one hook: batch ``step`` is tokens [step, step + 1) * batch_size of an endless sequence.

    An epoch visits every token of the split once, in an order made from the seed and the epoch's number. Left out
    are each row's BOS and, unless ``outlier_factor`` is None, the ``n_outliers`` tokens whose norm exceeds that many
    median norms. The next batch is read in the background while the caller works on this one.

    Raises:
        ConfigError: no such hook, or a batch larger than the split.
        TextError: the split is empty.
    """

    def __init__(
        self,
        store: ActivationStore,
        hook_name: str,
        *,
        batch_size: int,
        seed: int,
        split: Split = "train",
        outlier_factor: float | None = 10.0,
    ) -> None:
        self.store = store
        self.hook_name = store.check_hook(hook_name)
        self.batch_size = batch_size
        self.seed = seed
        self._rows = store.rows(split)
        if len(self._rows) == 0:
            raise TextError(f"{store.path} has no {split} rows; capture more documents, or change held_out")
        self.norm_limit: float | None = None
        self._outliers = np.empty(0, np.int64)
        if outlier_factor is not None:
            norms = torch.cat([block.norm(dim=1) for block in self._blocks(self._rows)])
            self.norm_limit = norm_limit(norms, outlier_factor=outlier_factor)
            self._outliers = np.flatnonzero((norms > self.norm_limit).numpy())
        if not 1 <= batch_size <= self.n_tokens:
            raise ConfigError(
                f"batch_size must be between 1 and the {self.n_tokens:,} {split} tokens of {store.path}, "
                f"got {batch_size}; lower it, or capture more text"
            )
        self._prefetcher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._prefetched: tuple[int, Future[Tensor]] | None = None

    @property
    def d_in(self) -> int:
        return self.store.d_in(self.hook_name)

    @property
    def n_outliers(self) -> int:
        return len(self._outliers)

    @property
    def n_tokens(self) -> int:
        """Tokens in an epoch, outliers not counted."""
        return len(self._rows) * (self.store.context - 1) - self.n_outliers

    def at(self, step: int) -> Float32[Tensor, "batch d_in"]:
        """The batch of ``step`` (from 0)."""
        if self._prefetched is not None and self._prefetched[0] == step:
            batch = self._prefetched[1].result()
        else:
            batch = self._read(step)
        self._prefetched = step + 1, self._prefetcher.submit(self._read, step + 1)
        return batch

    def positions(self, step: int) -> Int64[np.ndarray, " batch"]:
        """Where the tokens of a batch stand in the store: row x context + place in the row."""
        sequence = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, index = np.divmod(sequence, self.n_tokens)
        shuffled = np.empty_like(index)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            shuffled[now] = permuted(index[now], self.n_tokens, mixed_key(self.seed, int(epoch)))
        return self._positions_of(shuffled)

    def statistics(self, max_tokens: int | None = None) -> ActivationStats:
        """Statistics over the split, BOS and outliers left out; with ``max_tokens`` over rows spread through it."""
        n_rows = len(self._rows)
        if max_tokens is not None:
            n_rows = min(n_rows, max(1, -(-max_tokens // (self.store.context - 1))))
        spread = np.arange(n_rows) * len(self._rows) // n_rows
        limit = np.inf if self.norm_limit is None else self.norm_limit
        return moments(block[block.norm(dim=1) <= limit] for block in self._blocks(self._rows[spread]))

    def _read(self, step: int) -> Float32[Tensor, "batch d_in"]:
        return self.store.gather(self.hook_name, self.positions(step)).float()

    def _blocks(self, rows: Int64[np.ndarray, " rows"]) -> Iterator[Float[Tensor, "tokens d_in"]]:
        """All tokens of ``rows`` but BOS, in order, some rows at a time."""
        for start in range(0, len(rows), _ROWS_PER_BLOCK):
            acts = self.store.acts(self.hook_name, rows[start : start + _ROWS_PER_BLOCK])
            yield acts[:, 1:].float().flatten(0, 1)

    def _positions_of(self, index: Int64[np.ndarray, " batch"]) -> Int64[np.ndarray, " batch"]:
        """Positions in the store of the tokens with these numbers, outliers and BOS not counted."""
        # outlier i has i outliers before it, so i of the wanted tokens' numbers are taken by the time it is reached
        skipped = np.searchsorted(self._outliers - np.arange(len(self._outliers)), index, side="right")
        rows, places = np.divmod(index + skipped, self.store.context - 1)
        return self._rows[rows] * self.store.context + places + 1
