"""A report on explanations: every live feature of an SAE, and of its random-weights control, explained and scored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saelab import config as configs
from saelab import rundir
from saelab.activations.store import ActivationStore
from saelab.errors import ConfigError
from saelab.evals.controls import ControlsConfig, random_weights_control, randomised, why_no_control
from saelab.evals.kept import KeptPieces
from saelab.features.build import corpus_of
from saelab.features.codes import by_feature
from saelab.features.explain import Explained, all_explainers, explain_block
from saelab.features.explain_scores import Referees, ScoresConfig, drawn_for, score_feature
from saelab.features.explain_sides import ReadAnew, Scanned, Side, promoted_tokens, scanned, token_share
from saelab.features.explain_summary import scorable
from saelab.features.explainers.interface import Firings, firings_of
from saelab.features.explainers.text import Text, text_of
from saelab.features.label import CLEAR
from saelab.features.scan import Progress
from saelab.models.load import Model
from saelab.sae.base import SAE

#: A progress bar with this title; what it gives is called with done, total and a word.
Bar = Callable[[str], AbstractContextManager[Progress]]

#: Features explained between two notes of what is done.
BLOCK = 128

#: Rows on which the share of the tokens is measured.
_SHARE_ROWS = 200

_SCHEMA = 1  # raise when the same settings begin to give other explanations


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """What explanations are found and scored on."""

    tokens: int = 250_000
    """Tokens of the text, spread over the activations; at most all of them."""
    clear: float = CLEAR
    """Share of a feature's maximum from which on a firing is to be explained; weaker ones count neither way. 0 explains
    every firing."""
    draws: int = 2000
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the split into documents that find, choose and score, and of the samples."""
    control: bool = True
    """Train the same kind of SAE on the model with random weights, and explain that too."""
    scores: ScoresConfig = field(default_factory=ScoresConfig)
    """Scores that run a model, on a sample of the features."""
    controls: ControlsConfig = field(default_factory=lambda: ControlsConfig(tokens=500_000, training_tokens=2_500_000))
    """Training of the control; by default as much as the SAE's own up to what the demo's SAE saw."""

    def __post_init__(self) -> None:
        if self.tokens < 1000:
            raise ConfigError(f"tokens must be at least 1000, got {self.tokens}; 250000 is the default")
        if not 0 <= self.clear < 1:
            raise ConfigError(f"clear is a share of the maximum, from 0 to below 1, got {self.clear}; 0.25 is usual")
        if self.draws < 100:
            raise ConfigError(f"draws must be at least 100, got {self.draws}; 2000 is the default")


class ExplainRun:
    """The work of a report in its order. What is finished is kept, so that the same run goes on after a stop."""

    def __init__(
        self, sae_path: Path, sae: SAE, store: ActivationStore, model: Model, config: ExplainConfig, out: Path, bar: Bar
    ) -> None:
        self.sae_path, self.store, self.config, self.bar = sae_path, store, config, bar
        self.out = out
        self.kept = KeptPieces(out, self.content())
        self.own = Side("SAE", sae, model, store, f"{sae.d_sae:,} features")
        self.corpus = corpus_of(store, config.tokens)

    def content(self) -> dict[str, Any]:
        """All that the explanations depend on."""
        plain = configs.to_mapping(self.config)
        for name in ("draws", "scores"):
            plain.pop(name)
        return {
            "schema": _SCHEMA,
            "config": plain,
            "sae": rundir.fingerprint(self.sae_path),
            "activations": rundir.fingerprint(self.store.path),
        }

    @functools.cached_property
    def text(self) -> Text:
        model = self.own.model
        vocabulary = tuple(model.str_tokens(list(range(model.d_vocab))))
        return text_of(self.corpus.tokens, self.corpus.docs, vocabulary, seed=self.config.seed)

    # --- the control

    @functools.cached_property
    def no_control(self) -> str | None:
        """Why there is no control; None if there is one."""
        if not self.config.control:
            return "it was not asked for"
        return why_no_control(self.own.sae, self.sae_path, self.store, self.config.controls)

    @functools.cached_property
    def control(self) -> Side:
        model = randomised(self.own.model, seed=self.config.controls.seed)
        with self.bar("control") as progress:
            trained = random_weights_control(
                self.sae_path,
                self.store,
                model,
                self.config.controls,
                rows=np.asarray(self.store.rows("all"))[:1],  # its own held-out activations are not needed here
                progress=progress,
            )
        note = f"{trained.config.tokens:,} training tokens, {trained.n_tokens:,} distinct"
        return Side("random weights", trained.sae, model, ReadAnew(self.store, model), note)

    def sides(self) -> Iterator[Side]:
        yield self.own
        if self.no_control is None:
            yield self.control

    # --- explanations

    def scanned(self, side: Side) -> Scanned:
        """Where the features of a side fire, from its folder beside the result."""
        folder = self.kept.folder / f"{side.name.replace(' ', '-')}-{self.kept.digest}"
        with self.bar("encode") as progress:
            return scanned(side, self.corpus.rows, folder, progress=progress)

    def explained(self, side: Side, found: Scanned) -> list[Explained]:
        """Every feature that clearly fires, a block at a time."""
        explainers = functools.cache(
            lambda: all_explainers(self.text, promoted_tokens(side), seed=self.config.seed)
        )  # costly, and not needed where all blocks are kept

        def explain(low: int, high: int) -> dict[str, Any]:
            firings = self.firings(found, low, high)
            return {"features": [each.to_json() for each in explain_block(explainers(), firings, self.text)]}

        everything: list[Explained] = []
        with self.bar("explain") as progress:
            for low in range(0, side.sae.d_sae, BLOCK):
                high = min(low + BLOCK, side.sae.d_sae)
                name = f"{side.name.replace(' ', '-')}-{low:06d}"
                block = self.kept.get(name, functools.partial(explain, low, high))
                everything += [Explained.from_json(plain) for plain in block["features"]]
                progress(high, side.sae.d_sae, f"features, {side.name}")
        return everything

    def explain_feature(self, feature: int) -> Explained:
        """One feature of the SAE, by every explainer.

        Raises:
            ConfigError: it does not clearly fire in this text.
        """
        side = self.own
        firings = self.firings(self.scanned(side), feature, feature + 1)
        explainers = all_explainers(self.text, promoted_tokens(side), seed=self.config.seed)
        explained = explain_block(explainers, firings, self.text)
        if not explained:
            raise ConfigError(
                f"feature {feature} does not fire on these {self.corpus.n_tokens:,} tokens; read more with --tokens"
            )
        return explained[0]

    # --- scores that run a model

    def scored(
        self, side: Side, found: Scanned, explained: Sequence[Explained], referees: Referees
    ) -> dict[str, dict[int, float]]:
        """Of a sample of the explained features, by the name of the score and the number of the feature."""
        config = self.config.scores
        enough = [e for e in scorable(explained, least=config.least) if e.best is not None]
        rng = np.random.default_rng(self.config.seed)
        chosen = [enough[i] for i in sorted(rng.permutation(len(enough))[: config.features].tolist())]
        settings = {
            "scores": configs.to_mapping(config),
            "encoder": referees.encoder.name,
            "judge": referees.judge_name,
        }
        kept = KeptPieces(self.out, {**self.content(), **settings})
        scores: dict[str, dict[int, float]] = {}
        with self.bar("score") as progress:
            for done, each in enumerate(chosen, start=1):

                def make(each: Explained = each) -> dict[str, float]:
                    fired = self.firings(found, each.feature, each.feature + 1).of(0)
                    drawn = drawn_for(fired, self.text, config.texts, seed=each.feature)
                    return score_feature(side, each, drawn, referees, self.own.model, config)

                name = f"{side.name.replace(' ', '-')}-scores-{each.feature:06d}"
                for score, value in kept.get(name, make).items():
                    scores.setdefault(score, {})[each.feature] = value
                progress(done, len(chosen), f"features, {side.name}")
        return scores

    def firings(self, found: Scanned, low: int, high: int) -> Firings:
        """Where the features from ``low`` to below ``high`` fire."""
        pairs = by_feature(found.codes, low, high)
        return firings_of(pairs, found.max[low:high], first=low, clear=self.config.clear)

    def token_share(self, side: Side) -> float | None:
        """How much of the variance of a side's activations the token explains, on some rows spread over the text."""

        def measure() -> dict[str, float | None]:
            rows = self.corpus.rows[:: max(1, len(self.corpus.rows) // _SHARE_ROWS)]
            acts = side.acts.acts(side.sae.metadata.hook_name, rows)[:, 1:].flatten(0, 1)
            tokens = self.store.tokens(rows)[:, 1:].flatten().numpy()
            return {"share": token_share(acts, tokens)}

        return self.kept.get(f"{side.name.replace(' ', '-')}-tokens", measure)["share"]

    def documents(self) -> tuple[int, int, int]:
        """How many documents find, choose and score."""
        docs = self.corpus.docs.reshape(-1)
        counts: list[int] = [len(np.unique(docs[part])) for part in self.text.parts]
        return counts[0], counts[1], counts[2]

    def tokens(self) -> tuple[int, int, int]:
        """How many tokens find, choose and score."""
        counts = [int(part.sum()) for part in self.text.parts]
        return counts[0], counts[1], counts[2]
