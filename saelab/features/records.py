"""What a reader of the index gets: plain, frozen, without tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

LabelKind = Literal["token", "previous", "bigram", "promotes", "weak", "none", "dead"]


class RuleItem(NamedTuple):
    """One way in which a rule matches a position: by the token there, by the token before it, or by both."""

    previous: int | None
    token: int | None


@dataclass(frozen=True)
class Label:
    """A description made of the evidence itself, with its score on documents that did not choose it.

    ``precision`` is the share of the held-out positions matched by the rule on which the feature clearly fires (reaches
    a quarter of its maximum); ``recall`` the share of the held-out clear firings that the rule matches. Positions with
    weaker activations count neither way. Both are None where there is nothing to score.
    """

    text: str
    """Short and readable, for example ``" feet", " foot"`` or ``after " United"`` or ``" New" -> " York"``."""
    kind: LabelKind
    """token, previous, bigram: a rule on tokens. weak: such a rule with too few occurrences to trust, or one that does
    not hold on the other documents. promotes: no rule, but a clear effect on the logits. none: nothing clear. dead:
    never fired."""
    rule: tuple[RuleItem, ...]
    """Token ids; a position matches the rule if it matches one item. Empty for promotes, none and dead."""
    precision: float | None
    recall: float | None
    n_held_out: int
    """Held-out positions that the rule matches, those of weak firings left out: the number behind ``precision``."""

    @property
    def f1(self) -> float | None:
        """Harmonic mean of precision and recall."""
        if self.precision is None or self.recall is None:
            return None
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


@dataclass(frozen=True)
class Example:
    """A stretch of text around a position where the feature fires. ``acts[i]`` is its activation on ``tokens[i]``."""

    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    acts: tuple[float, ...]
    peak: int
    """Index, in ``tokens``, of the position that the example was chosen for."""
    doc: int
    title: str
    row: int
    position: int
    """Index of the peak inside its row of the store."""

    @property
    def act(self) -> float:
        """Activation at the peak."""
        return self.acts[self.peak]

    @property
    def token(self) -> str:
        """Token at the peak."""
        return self.tokens[self.peak]


class Histogram(NamedTuple):
    """Counts of positive activations; ``len(edges) == len(counts) + 1``. A bin is an eighth of an octave; the lowest
    begins at 0, the highest ends at the maximum."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class Quantiles(NamedTuple):
    """Quantiles of the activations on the tokens where the feature fires."""

    q50: float
    q90: float
    q99: float


class TokenEffect(NamedTuple):
    """What one unit of the feature adds to a token's logit, relative to the mean over the vocabulary.

    The direction goes through the final norm's gain and the unembedding; the norm's division by the residual's size is
    left out, so effects compare within a feature and across features of one hook, but are not logits of a given text.
    """

    token: str
    token_id: int
    effect: float


class Neighbour(NamedTuple):
    feature: int
    score: float


class TokenCount(NamedTuple):
    """How a feature and a token meet: firings of the feature on the token, the clear ones of them, and occurrences."""

    token: str
    token_id: int
    n_fired: int
    n_clear: int
    n_occurrences: int


@dataclass(frozen=True)
class FeatureRecord:
    """Everything the index knows about one feature. BOS positions count nowhere."""

    index: int
    density: float
    """Share of the tokens on which the feature fires."""
    n_fired: int
    n_clear: int
    """Tokens on which it reaches a quarter of its maximum: what its label and ``tokens`` are about."""
    max_act: float
    mean_act: float
    """Mean over the tokens on which it fires."""
    quantiles: Quantiles
    histogram: Histogram
    top_examples: tuple[Example, ...]
    """By activation, highest first; at most one from each row. Empty for a feature that never fired."""
    interval_examples: tuple[tuple[Example, ...], ...]
    """``interval_examples[j]`` is a uniform sample of the firings between ``interval_edges[j]`` and
    ``interval_edges[j + 1]``."""
    interval_edges: tuple[float, ...]
    """From 0 to the maximum. An interval is an octave, so it begins at half the height of the one above; the highest
    begins between a half and three quarters of the maximum."""
    tokens: tuple[TokenCount, ...]
    """Tokens it is most specific to, best first (by the F1 of "clearly fires exactly on this token")."""
    promoted: tuple[TokenEffect, ...]
    """Strongest first; empty where the hook does not write to the residual stream."""
    suppressed: tuple[TokenEffect, ...]
    logit_z: float
    """How far the most promoted token stands out: standard deviations above the mean over the vocabulary."""
    stands_out: bool
    """Whether ``logit_z`` exceeds what 99 % of random directions reach; if not, ``promoted`` is no more than noise."""
    neighbours_cosine: tuple[Neighbour, ...]
    """By cosine of the decoder rows."""
    neighbours_coactivation: tuple[Neighbour, ...]
    """By Jaccard index of the sets of tokens on which two features fire."""
    label: Label

    @property
    def alive(self) -> bool:
        return self.n_fired > 0


@dataclass(frozen=True)
class SearchHit:
    """A feature that a search found; a higher ``score`` is a better match, comparable within one search only."""

    feature: int
    score: float
    label: str
    density: float
    why: str
    """The evidence in a few words, for example ``fires on " feet" (83 %)``."""
