"""Short pieces of text in which a feature fires, and such in which it is silent, for scores that read whole texts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from saelab.features.explainers.interface import Fired
from saelab.features.explainers.text import Text
from saelab.models.load import Model

#: Tokens of a piece, and how many of them stand behind the firing it was chosen for.
LENGTH, AFTER = 32, 7


class Contexts(NamedTuple):
    """Pieces of text, and where in each the feature fires (weakly too)."""

    tokens: Int[np.ndarray, "pieces length"]
    fires: Bool[np.ndarray, "pieces length"]

    def __len__(self) -> int:
        return len(self.tokens)


class Drawn(NamedTuple):
    active: Contexts
    """With a clear firing, at most one from each row."""
    silent: Contexts
    """Without any."""


def draw_contexts(fired: Fired, text: Text, part: Bool[np.ndarray, " positions"], *, n: int, seed: int) -> Drawn:
    """At most ``n`` pieces of each kind from the documents of ``part``; BOS is in none."""
    rng = np.random.default_rng(seed)
    length = min(LENGTH, text.context - 1)
    everywhere = np.zeros(text.n_positions, bool)
    everywhere[fired.clear] = everywhere[fired.weak] = True
    peaks = rng.permutation(fired.clear[part[fired.clear]])
    _, first = np.unique(peaks // text.context, return_index=True)
    active = _pieces(peaks[np.sort(first)[:n]], everywhere, text, length)
    chance = rng.permutation(np.flatnonzero(part))[: 8 * n]
    candidates = _pieces(chance, everywhere, text, length)
    quiet = np.flatnonzero(~candidates.fires.any(1))[:n]
    return Drawn(active, Contexts(candidates.tokens[quiet], candidates.fires[quiet]))


def _pieces(
    positions: Int[np.ndarray, " n"], fires: Bool[np.ndarray, " positions"], text: Text, length: int
) -> Contexts:
    row, column = np.divmod(positions, text.context)
    start = np.clip(column - (length - 1 - AFTER), 1, text.context - length)
    places = (row * text.context + start)[:, None] + np.arange(length)
    return Contexts(text.tokens.reshape(-1)[places], fires[places])


def as_texts(contexts: Contexts, model: Model) -> list[str]:
    """The pieces as plain text."""
    return [model.tokenizer.decode(ids) for ids in contexts.tokens.tolist()]
