"""What batches from one hook, from several hooks and from pairs of stores share: the same tokens in the same order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from saelab.activations.moments import norm_limit
from saelab.activations.order import TokenOrder
from saelab.activations.prefetch import Prefetcher
from saelab.activations.store import ActivationStore, Split
from saelab.errors import ConfigError, TextError

_ROWS_PER_BLOCK = 64  # rows read at once by the passes over the whole store


class Slot(NamedTuple):
    """One of the vectors that a token has: what a store holds at a hook."""

    store: ActivationStore
    hook_name: str


class SlotBatches:
    """Shuffled tokens of ``slots``, whose stores hold the same tokens.

    An epoch visits every token of the split once, in an order made from the seed and the epoch's number. Left out
    are each row's BOS and, unless ``outlier_factor`` is None, the ``n_outliers`` tokens whose norm exceeds that many
    median norms in any slot. The next batch is read in the background while the caller works on this one.

    Raises:
        ConfigError: no such hook, or a batch larger than the split.
        TextError: the split is empty.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        batch_size: int,
        seed: int,
        split: Split = "train",
        outlier_factor: float | None = 10.0,
    ) -> None:
        self.slots = tuple(Slot(store, store.check_hook(hook_name)) for store, hook_name in slots)
        self.store = self.slots[0].store
        self.batch_size = batch_size
        self.seed = seed
        self._rows = self.store.rows(split)
        if len(self._rows) == 0:
            raise TextError(f"{self.store.path} has no {split} rows; capture more documents, or change held_out")
        limits = None if outlier_factor is None else [self._norm_limit(slot, outlier_factor) for slot in self.slots]
        self.norm_limits: tuple[float, ...] | None = None if limits is None else tuple(limit for limit, _ in limits)
        outlying = np.zeros(len(self._rows) * (self.store.context - 1), bool)
        for _, beyond in limits or ():
            outlying |= beyond
        self._outliers = np.flatnonzero(outlying)
        self._order = TokenOrder(self._rows, context=self.store.context, outliers=self._outliers, seed=seed)
        if not 1 <= batch_size <= self.n_tokens:
            raise ConfigError(
                f"batch_size must be between 1 and the {self.n_tokens:,} {split} tokens of {self.store.path}, "
                f"got {batch_size}; lower it, or capture more text"
            )
        self._portion = (0, 1)
        self._batches = Prefetcher(self._read)
        self.stall_s = 0.0
        """Seconds that callers of ``at`` have waited for data so far."""

    @property
    def d_in(self) -> int:
        """Width of the first slot."""
        return self.store.d_in(self.slots[0].hook_name)

    @property
    def n_outliers(self) -> int:
        return len(self._outliers)

    @property
    def n_tokens(self) -> int:
        """Tokens in an epoch, outliers not counted."""
        return self._order.n_tokens

    def at(self, step: int) -> Float32[Tensor, "batch *slots d_in"]:
        """The batch of ``step`` (from 0): tokens [step, step + 1) * batch_size of the endless sequence."""
        began = time.perf_counter()
        batch = self._batches.get(step)
        self.stall_s += time.perf_counter() - began
        return batch

    def positions(self, step: int) -> Int64[np.ndarray, " batch"]:
        """Where the tokens of a batch stand in the store: row x context + place in the row."""
        index, n_parts = self._portion
        size = self.batch_size // n_parts
        start = step * self.batch_size + index * size
        return self._order.positions(start, start + size)

    def portion_(self, index: int, n_parts: int) -> None:
        """From now on give only this part of each batch, one of ``n_parts`` of equal size, for as many processes."""
        self._portion = (index, n_parts)
        self._batches = Prefetcher(self._read)

    def _read(self, step: int) -> Float32[Tensor, "batch *slots d_in"]:
        """The batch of ``step``, from the stores."""
        raise NotImplementedError

    def _gathered(self, slot: Slot, step: int) -> Float32[Tensor, "batch d_in"]:
        """One slot of the batch of ``step``."""
        return slot.store.gather(slot.hook_name, self.positions(step)).float()

    def _usual_tokens(
        self, slots: Sequence[Slot], max_tokens: int | None
    ) -> Iterator[list[Float32[Tensor, "tokens d_in"]]]:
        """Tokens of these slots but BOS and outliers, block by block; about ``max_tokens`` spread over the split."""
        n_rows = len(self._rows)
        if max_tokens is not None:
            n_rows = min(n_rows, max(1, -(-max_tokens // (self.store.context - 1))))
        spread = np.arange(n_rows) * len(self._rows) // n_rows
        n = self.store.context - 1
        for some in _blocks_of(spread):
            numbers = (some[:, None] * n + np.arange(n)).ravel()
            usual = torch.from_numpy(np.isin(numbers, self._outliers, invert=True))
            yield [_tokens_of(slot, self._rows[some])[usual] for slot in slots]

    def _norm_limit(self, slot: Slot, outlier_factor: float) -> tuple[float, Bool[np.ndarray, " tokens"]]:
        """The norm beyond which a token is an outlier in this slot, and which tokens of the split are."""
        norms = torch.cat([_tokens_of(slot, rows).norm(dim=1) for rows in _blocks_of(self._rows)])
        limit = norm_limit(norms, outlier_factor=outlier_factor)
        return limit, (norms > limit).numpy()


def _blocks_of(rows: Int64[np.ndarray, " rows"]) -> Iterator[Int64[np.ndarray, " some"]]:
    for start in range(0, len(rows), _ROWS_PER_BLOCK):
        yield rows[start : start + _ROWS_PER_BLOCK]


def _tokens_of(slot: Slot, rows: Int64[np.ndarray, " rows"]) -> Float32[Tensor, "tokens d_in"]:
    """All tokens of ``rows`` but BOS, in order."""
    return slot.store.acts(slot.hook_name, rows)[:, 1:].float().flatten(0, 1)
