"""In which order training meets the tokens of a split: a formula of seed and step, with some tokens left out."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

from saelab.activations.permutation import mixed_key, permuted


class TokenOrder:
    """An endless sequence of tokens; each epoch visits every one that is not left out once, in an order of its own.

    Tokens are numbered from 0 within ``rows``, each row's BOS not counted: number = place of the row x (context - 1) +
    place in the row - 1. ``outliers`` are the numbers, ascending, of those to leave out.
    """

    def __init__(
        self,
        rows: Int64[np.ndarray, " rows"],
        *,
        context: int,
        outliers: Int64[np.ndarray, " outliers"],
        seed: int,
    ) -> None:
        self._rows = rows
        self._context = context
        self._outliers = outliers
        self._seed = seed

    @property
    def n_tokens(self) -> int:
        """Tokens in an epoch."""
        return len(self._rows) * (self._context - 1) - len(self._outliers)

    def positions(self, start: int, stop: int) -> Int64[np.ndarray, " n"]:
        """Where tokens [start, stop) of the sequence stand in the store: row x context + place in the row."""
        epochs, index = np.divmod(np.arange(start, stop), self.n_tokens)
        shuffled = np.empty_like(index)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            shuffled[now] = permuted(index[now], self.n_tokens, mixed_key(self._seed, int(epoch)))
        return self._positions_of(shuffled)

    def _positions_of(self, index: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Positions in the store of the tokens with these numbers, outliers not counted."""
        # outlier i has i outliers before it, so i of the wanted tokens' numbers are taken by the time it is reached
        skipped = np.searchsorted(self._outliers - np.arange(len(self._outliers)), index, side="right")
        rows, places = np.divmod(index + skipped, self._context - 1)
        return self._rows[rows] * self._context + places + 1
