"""The text that explanations are found, chosen and scored on: three parts, each of whole documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from saelab_kernels.search.hashing import hash64


class Parts(NamedTuple):
    """Positions by what their document is for; BOS, the first position of a row, is in none."""

    fit: Bool[np.ndarray, " positions"]
    """Half of the documents: here explanations are found."""
    choose: Bool[np.ndarray, " positions"]
    """A quarter: here the best explanation of each feature is chosen."""
    score: Bool[np.ndarray, " positions"]
    """A quarter: here it is scored."""


@dataclass(frozen=True, eq=False)
class Text:
    """Rows of tokens; a position is ``row * context + column``."""

    tokens: Int[np.ndarray, "rows context"]
    docs: Int[np.ndarray, "rows context"]
    vocabulary: tuple[str, ...]
    parts: Parts

    @property
    def n_positions(self) -> int:
        return self.tokens.size

    @property
    def context(self) -> int:
        return self.tokens.shape[1]

    def before(self, n: int) -> Int[np.ndarray, " positions"]:
        """The token ``n`` places before each position (behind it where ``n`` is negative), -1 outside the row."""
        shifted = np.full_like(self.tokens, -1)
        if n > 0:
            shifted[:, n:] = self.tokens[:, :-n]
        elif n < 0:
            shifted[:, :n] = self.tokens[:, -n:]
        else:
            shifted[:] = self.tokens
        return shifted.reshape(-1)


def text_of(
    tokens: Int[np.ndarray, "rows context"],
    docs: Int[np.ndarray, "rows context"],
    vocabulary: tuple[str, ...],
    *,
    seed: int,
) -> Text:
    """The text with its documents dealt out to the three parts by a hash of their number."""
    quarter = hash64(seed, np.zeros(docs.size, np.int64), docs.reshape(-1).astype(np.int64)) >> np.uint64(62)
    counted = np.ones(docs.shape, bool)
    counted[:, 0] = False
    fit, choose, score = (counted.reshape(-1) & part for part in (quarter < 2, quarter == 2, quarter == 3))
    return Text(tokens, docs, vocabulary, Parts(fit, choose, score))
