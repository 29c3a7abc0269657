"""The scores that run a model, for one feature: example embedding, surprisal, causal effect, and those of a judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from saelab.align.critics import Critic
from saelab.errors import ConfigError
from saelab.features.contexts import Drawn, draw_contexts
from saelab.features.encoders import Encoder
from saelab.features.explain import Explained
from saelab.features.explain_sides import Side
from saelab.features.explainers.interface import Fired
from saelab.features.explainers.text import Text
from saelab.features.judge import ask_for_explanation, detection_score, fuzzing_score
from saelab.features.score_causal import causal_effect
from saelab.features.score_texts import example_embedding_score, surprisal_score
from saelab.models.load import Model

#: Examples that a judge is shown when it is asked for an explanation, and that make the mean embedding.
N_EXAMPLES = 16

#: Each score: how it is measured, and what it is where there is nothing to find.
MEANINGS = {
    "example embedding": ("AUC: texts in which the feature fires lie nearer to its examples", 0.5),
    "surprisal": ("AUC: the explanation in front makes texts in which it fires likelier", 0.5),
    "causal effect": ("nats by which adding the feature raises the tokens named, beyond a random direction", 0.0),
    "detection": ("AUC: the judge finds the texts in which it fires, by the judge-free explanation", 0.5),
    "fuzzing": ("AUC: the judge tells right marks from wrong ones, by the judge-free explanation", 0.5),
    "detection, judge's words": ("AUC: the same by an explanation that the judge wrote", 0.5),
    "fuzzing, judge's words": ("AUC: the same by an explanation that the judge wrote", 0.5),
}


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Scores that run a model."""

    features: int = 24
    """Features that are scored, drawn from those with enough firings; none are with 0."""
    texts: int = 8
    """Texts of each kind (fires, silent) for a feature, of the scoring documents."""
    least: int = 10
    """Clear firings in the scoring documents that a feature must have to be drawn."""
    strength: float = 0.3
    """Steering of the causal effect: norm added, as a share of the mean residual norm."""

    def __post_init__(self) -> None:
        if self.features < 0 or self.texts < 2 or self.least < 1:
            raise ConfigError(
                "scores.features must be at least 0, scores.texts at least 2 and scores.least at least 1, got "
                f"{self.features}, {self.texts} and {self.least}; raise them"
            )


class Referees(NamedTuple):
    """Who helps to score."""

    encoder: Encoder
    judge: Critic | None = None

    @property
    def judge_name(self) -> str | None:
        return None if self.judge is None else self.judge.name


class Material(NamedTuple):
    """The pieces of text that the scores of one feature read."""

    examples: Drawn
    """Of the fitting documents."""
    texts: Drawn
    """Of the scoring documents."""


def drawn_for(fired: Fired, text: Text, n_texts: int, *, seed: int) -> Material:
    """The material for one feature."""
    return Material(
        draw_contexts(fired, text, text.parts.fit, n=N_EXAMPLES, seed=seed),
        draw_contexts(fired, text, text.parts.score, n=n_texts, seed=seed + 1),
    )


def score_feature(
    side: Side, explained: Explained, material: Material, referees: Referees, reader: Model, config: ScoresConfig
) -> dict[str, float]:
    """Every score that applies, by its name in ``MEANINGS``. ``reader`` is the model with its own weights: texts of the
    control are read by it too, so that both sides are judged by the same one.

    A score is left out where it is not defined: no example, no silent text (a feature that fires everywhere), nothing
    named.
    """
    examples, texts = material
    best, scores = explained.best, {}
    if best is None or not len(texts.active) or not len(texts.silent) or not len(examples.active):
        return {}
    scores["example embedding"] = example_embedding_score(referees.encoder, examples.active, texts, reader)
    scores["surprisal"] = surprisal_score(reader, best.text, texts)
    if best.names:
        feature = side.sae.feature(explained.feature)
        effect = causal_effect(side.model, feature, best.names, texts.silent.tokens, strength=config.strength)
        scores["causal effect"] = effect.advantage
    if referees.judge is not None:
        words = ask_for_explanation(referees.judge, examples.active, reader)
        for suffix, explanation in (("", best.text), (", judge's words", words)):
            scores[f"detection{suffix}"] = detection_score(referees.judge, explanation, texts, reader)
            scores[f"fuzzing{suffix}"] = fuzzing_score(referees.judge, explanation, texts.active, reader)
    return scores
