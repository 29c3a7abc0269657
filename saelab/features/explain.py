"""Explain the features of a block: every explainer, the best of them by documents it did not see, its score by others.

fit      half of the documents        explanations are found
choose   a quarter                    the one with the highest F1 becomes the feature's explanation
score    a quarter                    precision, recall and F1 of it, and of the others, that are reported
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from saelab.features.explainers.interface import Explainer, Explanation, Fired, Firings
from saelab.features.explainers.ngrams import ngrams, token_sets
from saelab.features.explainers.patterns import patterns
from saelab.features.explainers.promoted import PromotedExplainer
from saelab.features.explainers.text import Text
from saelab.features.explainers.trees import TreeExplainer

#: From the simplest to the richest: of equally good explanations the earlier is taken.
KINDS = ("token set", "n-gram", "regex", "logit table", "tree")


class Tally(NamedTuple):
    """How an explanation did on a part of the text."""

    n_matched: int
    """Positions on which it says that the feature fires, those of weak firings left out."""
    n_both: int
    """Those of them on which it clearly fires."""
    n_clear: int
    """Positions on which it clearly fires."""

    @property
    def precision(self) -> float | None:
        """None where it matches nothing."""
        return self.n_both / self.n_matched if self.n_matched else None

    @property
    def recall(self) -> float | None:
        """None where the feature does not fire."""
        return self.n_both / self.n_clear if self.n_clear else None

    @property
    def f1(self) -> float:
        """2 both / (matched + clear); 0 where there is neither."""
        return 2 * self.n_both / max(self.n_matched + self.n_clear, 1)


@dataclass(frozen=True)
class Candidate:
    """What one explainer says of a feature."""

    kind: str
    text: str
    choose: Tally
    score: Tally
    names: tuple[int, ...] = ()


@dataclass(frozen=True)
class Explained:
    """A feature with all that was said of it."""

    feature: int
    n_clear: tuple[int, int, int]
    """Clear firings in the three parts."""
    candidates: tuple[Candidate, ...]
    """In the order of ``KINDS``; one that matches nothing in the choosing documents is among them."""

    @property
    def best(self) -> Candidate | None:
        """The candidate with the highest F1 on the choosing documents; None where none is right there at all."""
        found = max(self.candidates, key=lambda c: c.choose.f1, default=None)
        return found if found is not None and found.choose.f1 > 0 else None

    def to_json(self) -> dict[str, Any]:
        plain = [
            {"kind": c.kind, "text": c.text, "choose": list(c.choose), "score": list(c.score), "names": list(c.names)}
            for c in self.candidates
        ]
        return {"feature": self.feature, "n_clear": list(self.n_clear), "candidates": plain}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Explained:
        candidates = tuple(
            Candidate(c["kind"], c["text"], Tally(*c["choose"]), Tally(*c["score"]), tuple(c["names"]))
            for c in plain["candidates"]
        )
        a, b, c = plain["n_clear"]
        return cls(plain["feature"], (a, b, c), candidates)


def all_explainers(text: Text, promoted: np.ndarray | None, *, seed: int) -> list[Explainer]:
    """One of each kind; no logit table where the hook has none (``promoted`` is None)."""
    table = [] if promoted is None else [PromotedExplainer(promoted, text)]
    return [token_sets(text), ngrams(text), patterns(text), *table, TreeExplainer(text, seed=seed)]


def explain_block(explainers: Sequence[Explainer], firings: Firings, text: Text) -> list[Explained]:
    """Every feature of the block that clearly fires in the text."""
    said = [explainer.explain(firings) for explainer in explainers]
    kinds = [explainer.name for explainer in explainers]
    explained = []
    for i in range(firings.n_features):
        fired = firings.of(i)
        if len(fired.clear):
            found = [(kind, column[i]) for kind, column in zip(kinds, said, strict=True)]
            explained.append(_of_feature(firings.first + i, fired, found, text))
    return explained


def tally(predicted: Bool[np.ndarray, " positions"], fired: Fired, part: Bool[np.ndarray, " positions"]) -> Tally:
    """Compare a prediction with what happens in a part of the text."""
    clear, weak = (positions[part[positions]] for positions in fired)
    n_matched = int(np.count_nonzero(predicted & part)) - int(np.count_nonzero(predicted[weak]))
    return Tally(n_matched, int(np.count_nonzero(predicted[clear])), len(clear))


def _of_feature(number: int, fired: Fired, found: Sequence[tuple[str, Explanation | None]], text: Text) -> Explained:
    candidates = []
    for kind, explanation in found:
        if explanation is not None:
            predicted = explanation.fires()
            choose, score = (tally(predicted, fired, part) for part in (text.parts.choose, text.parts.score))
            candidates.append(Candidate(kind, explanation.text, choose, score, explanation.names))
    n_fit, n_choose, n_score = (int(np.count_nonzero(part[fired.clear])) for part in text.parts)
    return Explained(number, (n_fit, n_choose, n_score), tuple(candidates))
