"""Which evaluations run, in which order; what cannot run says why.

core    how faithful: reconstruction, sparsity, the model's predictions, on held-out text; other SAEs beside it
full    and what the features are worth: baselines, controls, sparse probing, absorption, stability, meta-SAE

Probing, absorption, stability and the meta-SAE flatter any SAE, also one of a model that learned nothing. So each of
their numbers stands beside that of the same SAE trained on the model with random weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab import config as configs
from saelab import rundir
from saelab.activations.store import ActivationStore
from saelab.evals import reconstruction
from saelab.evals.absorption import AbsorptionConfig, first_letters
from saelab.evals.baselines import baselines
from saelab.evals.compare import differences
from saelab.evals.controls import (
    Control,
    ControlsConfig,
    Quality,
    quality,
    random_weights_control,
    randomised,
    shuffled_control,
    why_no_control,
)
from saelab.evals.kept import KeptPieces
from saelab.evals.meta import MetaConfig, meta_structure
from saelab.evals.piece import Piece, beside
from saelab.evals.probing import ProbingConfig, probing
from saelab.evals.reconstruction import EvalConfig
from saelab.evals.stability import StabilityConfig, stability
from saelab.models.load import Model
from saelab.sae.base import SAE

Progress = Callable[[int, int, str], None]
Bar = Callable[[str], AbstractContextManager[Progress]]

_SCHEMA = 1  # raise when the same settings begin to give other numbers


@dataclass(frozen=True, kw_only=True)
class SuiteConfig(EvalConfig):
    """What to evaluate, and how much of it."""

    suite: Literal["core", "full"] = "core"
    """core: reconstruction and predictions. full: and baselines, controls, probing, absorption, stability, meta-SAE."""
    controls: ControlsConfig = field(default_factory=ControlsConfig)
    """The same SAE where there is nothing to find (full)."""
    probing: ProbingConfig = field(default_factory=ProbingConfig)
    """Sparse probes on labelled texts (full)."""
    absorption: AbsorptionConfig = field(default_factory=AbsorptionConfig)
    """First-letter absorption and feature splitting (full)."""
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    """Features found again by another seed (full)."""
    meta: MetaConfig = field(default_factory=MetaConfig)
    """Shared structure of the features' directions (full)."""


class Run(NamedTuple):
    """An SAE and the directory it comes from."""

    path: Path
    sae: SAE


def run_suite(
    run: Run,
    others: Sequence[Run],
    store: ActivationStore,
    model: Model,
    config: SuiteConfig,
    kept: KeptPieces,
    bar: Bar,
) -> dict[str, Any]:
    """Plain data for eval.json: what ``report`` of the core gives, and the differences and pieces of the suite.

    Raises:
        ArtifactError: an SAE was made for another model or hook, or the store holds no held-out text.
        TextError: labelled texts that cannot be read.
        Interrupted: Ctrl-C; finished pieces are kept.
    """
    bench = _Bench(run, others, store, model, config, kept, bar)
    core = bench.core
    result = core["report"] | {"suite": config.suite, "about": _about(run, store), "differences": core["differences"]}
    pieces: list[dict[str, Any]] = []
    if config.suite == "full":
        for name, make in bench.pieces().items():
            pieces.append(kept.get(name, lambda make=make: make().to_json()))  # type: ignore[misc]
    return result | {"pieces": pieces}


def content(run: Run, others: Sequence[Run], store: ActivationStore, config: SuiteConfig) -> dict[str, Any]:
    """All that the numbers depend on, as far as it can be named."""
    settings = configs.to_mapping(config)
    del settings["suite"]
    return {
        "schema": _SCHEMA,
        "sae": rundir.fingerprint(run.path),
        "others": [rundir.fingerprint(other.path) for other in others],
        "activations": rundir.fingerprint(store.path),
        "config": settings,
    }


def seeds_of(run: Run, others: Sequence[Run]) -> list[Run]:
    """Those of ``others`` that were trained as ``run`` was, but for the seed."""

    def recipe(path: Path) -> dict[str, Any]:
        return {k: v for k, v in rundir.read_run(path, "sae")["config"].items() if k != "seed"}

    def seed(path: Path) -> Any:
        return rundir.read_run(path, "sae")["config"].get("seed")

    if not (run.path / "run.json").exists():
        return []
    trained = [other for other in others if (other.path / "run.json").exists()]
    return [o for o in trained if recipe(o.path) == recipe(run.path) and seed(o.path) != seed(run.path)]


class _Bench:
    """One evaluation at work: what several pieces need is made once, and only if one of them needs it."""

    def __init__(
        self,
        run: Run,
        others: Sequence[Run],
        store: ActivationStore,
        model: Model,
        config: SuiteConfig,
        kept: KeptPieces,
        bar: Bar,
    ) -> None:
        self.run, self.others, self.store, self.model = run, others, store, model
        self.config, self.kept, self.bar = config, kept, bar
        self.sae = run.sae

    def pieces(self) -> dict[str, Callable[[], Piece]]:
        """The pieces of the full suite, in the order of the report."""
        return {
            "baselines": self.baselines,
            "controls": self.controls,
            "probing": self.probing,
            "absorption": self.absorption,
            "stability": self.stability,
            "meta": self.meta,
        }

    # --- the core

    @functools.cached_property
    def core(self) -> dict[str, Any]:
        return self.kept.get("core", self._core)

    def _core(self) -> dict[str, Any]:
        config = self.config
        with self.bar("core") as progress:
            if not self.others:
                evaluation = reconstruction.evaluate(self.sae, self.store, self.model, config, progress=progress)
                return {
                    "report": reconstruction.report(evaluation),
                    "differences": [],
                    "fired": [evaluation.fired.tolist()],
                }
            saes = [self.sae, *(other.sae for other in self.others)]
            sums = reconstruction.measure(saes, self.store, self.model, config, progress=progress)
        found = [
            difference.to_json()
            for other, theirs in zip(self.others, sums[1:], strict=True)
            for difference in differences(
                sums[0], theirs, against=str(other.path), draws=config.draws, seed=config.seed
            )
        ]
        return {
            "report": reconstruction.report(reconstruction.summarise(sums[0], config)),
            "differences": found,
            "fired": [s.fired.tolist() for s in sums],
        }

    def live(self, number: int = 0) -> Bool[Tensor, " d_sae"]:
        """Which features of the SAE, or of another, fired on the held-out tokens."""
        return torch.tensor(self.core["fired"][number]) > 0

    @property
    def is_plain(self) -> bool:
        """Whether the SAE stands for the activations that it reads."""
        read, written = reconstruction.hooks(self.sae)
        return read == written

    # --- where there is nothing to find

    @functools.cached_property
    def no_control(self) -> str | None:
        """Why the SAE cannot be trained again on other activations; None if it can."""
        return why_no_control(self.sae, self.run.path, self.store, self.config.controls)

    @functools.cached_property
    def random_model(self) -> Model:
        return randomised(self.model, seed=self.config.controls.seed)

    @functools.cached_property
    def random_control(self) -> Control:
        return self._random_control(None)

    def _random_control(self, sae_seed: int | None) -> Control:
        with self.bar("control") as progress:
            return random_weights_control(
                self.run.path,
                self.store,
                self.random_model,
                self.config.controls,
                rows=self._rows,
                sae_seed=sae_seed,
                progress=progress,
            )

    @functools.cached_property
    def random_quality(self) -> Quality:
        return self._quality(self.random_control, "random weights")

    def _quality(self, control: Control, label: str) -> Quality:
        return quality(control, label, draws=self.config.draws, seed=self.config.seed)

    @functools.cached_property
    def _rows(self) -> Any:
        return reconstruction.held_out_rows(self.store, tokens=self.config.tokens)

    def _with_control(self, piece: Piece, make: Callable[[], Piece]) -> Piece:
        """``piece`` beside what ``make`` finds for the SAE of the model with random weights."""
        if piece.skipped is not None:
            return piece
        reason = self.no_control
        return beside(piece, make() if reason is None else Piece(name=piece.name, skipped=reason))

    # --- the pieces

    def baselines(self) -> Piece:
        if not self.is_plain:
            return Piece(
                name="baselines", skipped="PCA and coordinates reconstruct what they read, a transcoder does not"
            )
        return baselines(
            self.store,
            self.sae.metadata.hook_name,
            l0=self.core["report"]["metrics"]["l0"]["value"],
            rows=self._rows,
            fit_tokens=self.config.controls.tokens,
            draws=self.config.draws,
            seed=self.config.seed,
        )

    def controls(self) -> Piece:
        if self.no_control is not None:
            return Piece(name="controls", skipped=self.no_control)
        with self.bar("shuffled") as progress:
            control = shuffled_control(
                self.run.path,
                self.store,
                self.config.controls,
                rows=self._rows,
                device=self.model.device,
                progress=progress,
            )
        found = [self.random_quality.piece, self._quality(control, "shuffled").piece]
        own = rundir.read_run(self.run.path, "sae")["config"]["tokens"]
        notes = [note for piece in found for note in piece.notes]
        return Piece(
            name="controls",
            scores=tuple(score for piece in found for score in piece.scores),
            notes=(*notes, f"The SAE itself was trained on {own:,}."),
        )

    def probing(self) -> Piece:
        if not self.config.probing.data:
            return Piece(name="probing", skipped="no labelled texts were given; name some with --probe-data FILE")

        def probe(sae: SAE, model: Model, title: str) -> Piece:
            with self.bar(title) as progress:
                return probing(
                    sae, model, self.config.probing, draws=self.config.draws, seed=self.config.seed, progress=progress
                )

        piece = probe(self.sae, self.model, "probing")
        return self._with_control(piece, lambda: probe(self.random_control.sae, self.random_model, "its control"))

    def absorption(self) -> Piece:
        if not self.is_plain:
            return Piece(name="absorption", skipped="a transcoder's decoder does not write where its words are read")

        def letters(sae: SAE, model: Model, title: str) -> Piece:
            with self.bar(title) as progress:
                return first_letters(
                    sae,
                    model,
                    self.config.absorption,
                    draws=self.config.draws,
                    seed=self.config.seed,
                    progress=progress,
                )

        piece = letters(self.sae, self.model, "absorption")
        return self._with_control(piece, lambda: letters(self.random_control.sae, self.random_model, "its control"))

    def stability(self) -> Piece:
        twins = [(i, other) for i, other in enumerate(self.others, start=1) if other in seeds_of(self.run, self.others)]
        if not twins:
            return Piece(
                name="stability",
                skipped="it needs the same SAE trained with another seed; train one with the same settings and "
                "--seed 1, and give it with --against",
            )
        compared = [(other.sae, self.live(i)) for i, other in twins]

        def found(sae: SAE, live: Tensor, others: Sequence[tuple[SAE, Tensor]]) -> Piece:
            return stability(sae, live, others, self.config.stability, draws=self.config.draws, seed=self.config.seed)

        def control() -> Piece:
            twin = self._random_control(self.random_control.config.seed + 1)
            second = self._quality(twin, "random weights")
            return found(self.random_control.sae, self.random_quality.live, [(twin.sae, second.live)])

        return self._with_control(found(self.sae, self.live(), compared), control)

    def meta(self) -> Piece:
        def structure(sae: SAE, live: Tensor, title: str) -> Piece:
            with self.bar(title) as progress:
                return meta_structure(
                    sae, live, self.config.meta, draws=self.config.draws, seed=self.config.seed, progress=progress
                )

        piece = structure(self.sae, self.live(), "meta-SAE")
        return self._with_control(
            piece, lambda: structure(self.random_control.sae, self.random_quality.live, "its control")
        )


def _about(run: Run, store: ActivationStore) -> dict[str, Any]:
    return {
        "sae": str(run.path),
        "arch": run.sae.cfg.arch,
        "d_sae": run.sae.d_sae,
        "d_in": run.sae.d_in,
        "hook_name": run.sae.metadata.hook_name,
        "model": store.manifest.model.name,
        "text": store.manifest.text.source,
    }
