"""What all explainers share: firings in, one explanation a feature out, found on the fitting documents alone."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.features.codes import Pairs


@runtime_checkable
class Explanation(Protocol):
    """A claim about where a feature fires, as a person reads it and as a prediction for every position."""

    @property
    def text(self) -> str:
        """Short and readable."""
        ...

    @property
    def names(self) -> tuple[int, ...]:
        """The tokens that it says the feature is about, for the causal score; empty where it names none."""
        ...

    def fires(self) -> Bool[np.ndarray, " positions"]:
        """Where, in the text that it was found in, the feature fires according to it."""
        ...


class Firings(NamedTuple):
    """Where the features of a block fire, and where clearly."""

    pairs: Pairs
    clear: Pairs
    first: int
    """Number of the block's first feature in the SAE."""

    @property
    def n_features(self) -> int:
        return self.pairs.n_features

    def of(self, i: int) -> Fired:
        """Those of the block's feature ``i``."""
        every, clear = (p.positions[p.offsets[i] : p.offsets[i + 1]] for p in (self.pairs, self.clear))
        return Fired(clear, np.setdiff1d(every, clear, assume_unique=True))


class Fired(NamedTuple):
    """Positions on which one feature fires, ascending."""

    clear: Int[np.ndarray, " clear"]
    weak: Int[np.ndarray, " weak"]
    """Below a quarter of its maximum (or what else was set): these count neither for nor against an explanation."""


@runtime_checkable
class Explainer(Protocol):
    """Finds explanations of one kind."""

    @property
    def name(self) -> str: ...

    def explain(self, firings: Firings) -> list[Explanation | None]:
        """One explanation a feature, None where none of this kind says anything. Reads the fitting documents alone."""
        ...


def firings_of(pairs: Pairs, maxima: Float[np.ndarray, " features"], *, first: int, clear: float) -> Firings:
    """Call a firing clear where it reaches the share ``clear`` of the feature's maximum."""
    return Firings(pairs, pairs.above((clear * maxima).astype(np.float32)), first)
