"""Probes: can a class of texts be read off a model's activations, and is that more than its words give away?

Half of the groups of texts train a probe and half test it; penalty and layer are chosen on folds of the training half.
Beside every figure stand two controls:

shuffled labels   the same again with the labels permuted over all texts, trained and tested by the permuted ones: the
                  AUROC is 0.5, unless something leaks from one half into the other
bag of words      a regression on the words of the texts, for which no model is needed

Sources: Alain and Bengio 2016, arXiv 1610.01644, for linear probes; Hewitt and Liang 2019, arXiv 1909.03368, for the
need of controls; recall at 1 % false alarms as in Goldowsky-Dill et al. 2025, arXiv 2502.03407.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from saelab.errors import ConfigError
from saelab.interp.linear_fits import Chosen, Fold, LinearFit, best_logistic, best_of, mean_difference_fit, sparse_fit
from saelab.interp.pooled_acts import PooledActs, check_position, pooled_acts
from saelab.interp.probe_data import Halves, ProbeTexts, both_classes, halves
from saelab.interp.probe_direction import About, Probe
from saelab.interp.probe_scores import (
    Calibration,
    ProbeFigures,
    auroc_difference,
    auroc_of,
    calibrated,
    figure_values,
    probe_figures,
)
from saelab.interp.word_control import WordControl, word_control
from saelab.models.hooks import canonical_hook_name
from saelab.models.load import Model
from saelab.sae.base import SAE
from saelab.stats import Interval, interval_of_mean

Progress = Callable[[int, int, str], None]
DenseMethod = Literal["logistic", "mean_difference"]


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """How probes are trained and judged."""

    position: str = "last"
    """Token to read: last, mean or max over all tokens, or a whole number (0 the first behind BOS, -1 the last)."""
    methods: tuple[DenseMethod, ...] = ("logistic", "mean_difference")
    """Probes on all coordinates of the activations."""
    ks: tuple[int, ...] = (1, 5)
    """With an SAE: numbers of features of the probes on its features."""
    max_tokens: int = 128
    """Of longer texts only the beginning is read."""
    shuffles: int = 20
    """Permutations of the labels, for the control."""
    draws: int = 1000
    """Bootstrap draws of groups."""
    seed: int = 0
    """Seed of the split, of the permutations and of the bootstrap."""

    def __post_init__(self) -> None:
        check_position(self.position)
        for name in ("max_tokens", "shuffles", "draws"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if any(k < 1 for k in self.ks):
            raise ConfigError(f"ks must be numbers of at least 1, got {list(self.ks)}; 1 and 5 are usual")
        if not self.methods and not self.ks:
            raise ConfigError("there is no probe to train; name methods (logistic, mean_difference), or ks for an SAE")


class ProbeResult(NamedTuple):
    """A probe, and how it does on texts of groups that it has not seen."""

    probe: Probe
    validation_auroc: float  # mean over folds of the training texts
    figures: ProbeFigures
    shuffled: ProbeFigures  # means over the permutations; their intervals resample permutations
    over_words: Interval  # AUROC minus that of the bag of words, of the same texts


class ProbeStudy(NamedTuple):
    """All probes on one set of texts."""

    data: ProbeTexts
    parts: Halves
    words: ProbeFigures
    results: list[ProbeResult]
    n_tokens: int
    n_cut: int

    @property
    def best(self) -> ProbeResult:
        """The one with the highest validation AUROC: chosen without a look at the test texts."""
        return max(self.results, key=lambda result: result.validation_auroc)


def probe(
    model: Model,
    data: ProbeTexts,
    hook_names: str | Sequence[str] = (),
    *,
    sae: SAE | None = None,
    config: ProbeConfig | None = None,
    batch_texts: int = 16,
    progress: Progress | None = None,
) -> ProbeStudy:
    """Train and test probes at each hook and, with ``sae``, on its features; the model reads each text once.

    Raises:
        ConfigError: no hook and no SAE, an unknown hook, or an SAE that does not say its hook or has another width.
        TextError: too few texts or groups, or a text without a token at the position.
    """
    config = config or ProbeConfig()
    hooks = list(dict.fromkeys(map(canonical_hook_name, [hook_names] if isinstance(hook_names, str) else hook_names)))
    _check_hooks(model, hooks, sae, config)
    parts = halves(data, seed=config.seed)
    pooled = pooled_acts(
        model,
        data.texts,
        hooks,
        position=config.position,
        max_tokens=config.max_tokens,
        sae=sae if config.ks else None,
        batch_texts=batch_texts,
        progress=progress,
    )
    control = word_control(data.texts, data.positive, parts)
    bench = _Bench(
        data, parts, control, permuted_labels(data.positive, parts, config.shuffles, seed=config.seed), config
    )
    tasks, results = list(_tasks(hooks, pooled, sae, config)), []
    for number, task in enumerate(tasks, start=1):
        results.append(_result(bench, task, model, sae))
        if progress:
            progress(number, len(tasks), f"probes: {task.method} at {task.hook_name}")
    return ProbeStudy(data, parts, _figures(bench, *control), results, pooled.n_tokens, pooled.n_cut)


def _check_hooks(model: Model, hooks: Sequence[str], sae: SAE | None, config: ProbeConfig) -> None:
    if not (hooks and config.methods) and not (sae and config.ks):
        raise ConfigError(
            "there is nothing to probe; name a hook, for example blocks.10.hook_resid_post, or give an SAE"
        )
    for name in hooks:
        model.check_hook(name)
    if sae is None:
        return
    if not sae.metadata.hook_name:
        raise ConfigError("the SAE does not say which hook it reads; write hook_name into its cfg.json")
    if (width := model.hook_width(sae.metadata.hook_name)) != sae.d_in:
        raise ConfigError(
            f"the SAE reads width {sae.d_in}, but {sae.metadata.hook_name} of {model.name} has width {width}; "
            "give the model that it was trained on"
        )
    if too_many := [k for k in config.ks if k > sae.d_sae]:
        raise ConfigError(f"ks holds {too_many[0]}, but the SAE has {sae.d_sae} features; lower it")


class _Task(NamedTuple):
    """A probe to train."""

    method: str
    hook_name: str
    columns: Float[np.ndarray, "texts columns"]
    mean_norm: float


def _tasks(hooks: Sequence[str], pooled: PooledActs, sae: SAE | None, config: ProbeConfig) -> Iterator[_Task]:
    for hook_name in hooks:
        for method in config.methods:
            yield _Task(method, hook_name, pooled.acts[hook_name], pooled.mean_norms[hook_name])
    if sae is not None and pooled.feature_acts is not None:
        name = sae.metadata.hook_name
        for k in config.ks:
            yield _Task(f"sae_k{k}", canonical_hook_name(name), pooled.feature_acts, pooled.mean_norms[name])


def permuted_labels(
    positive: Bool[np.ndarray, " texts"], parts: Halves, n: int, *, seed: int
) -> list[Bool[np.ndarray, " texts"]]:
    """``n`` permutations of the labels over all texts, with both classes in each half and in each fold."""
    rng = np.random.default_rng([seed, 1])
    pieces = [parts.train, parts.test, *(parts.train[piece] for fold in parts.folds for piece in fold)]
    found: list[np.ndarray] = []
    while len(found) < n:
        permuted = rng.permutation(positive)
        if all(both_classes(permuted[piece]) for piece in pieces):
            found.append(permuted)
    return found


class _Bench(NamedTuple):
    """What all probes of a study are measured on."""

    data: ProbeTexts
    parts: Halves
    control: WordControl
    permuted: list[np.ndarray]
    config: ProbeConfig


def _result(bench: _Bench, task: _Task, model: Model, sae: SAE | None) -> ProbeResult:
    train, test = bench.parts.train, bench.parts.test
    chosen = _chosen(task.method, task.columns[train], bench.data.positive[train], bench.parts.folds)
    calibration = calibrated(chosen.out_of_fold, bench.data.positive[train])
    scores = chosen.fit.scores(task.columns[test])
    over_words = auroc_difference(
        scores,
        bench.control.scores,
        bench.data.positive[test],
        bench.data.groups[test],
        draws=bench.config.draws,
        seed=bench.config.seed,
    )
    return ProbeResult(
        _as_probe(bench, task, chosen.fit, calibration, model, sae),
        chosen.quality,
        _figures(bench, scores, calibration.probabilities(scores)),
        _shuffled(bench, task),
        over_words,
    )


def _figures(
    bench: _Bench, scores: Float[np.ndarray, " test"], probabilities: Float[np.ndarray, " test"]
) -> ProbeFigures:
    test, config = bench.parts.test, bench.config
    positive, groups = bench.data.positive[test], bench.data.groups[test]
    return probe_figures(scores, probabilities, positive, groups, draws=config.draws, seed=config.seed)


def _shuffled(bench: _Bench, task: _Task) -> ProbeFigures:
    train, test = bench.parts.train, bench.parts.test
    values = []
    for positive in bench.permuted:
        chosen = _chosen(task.method, task.columns[train], positive[train], bench.parts.folds)
        scores = chosen.fit.scores(task.columns[test])
        probabilities = calibrated(chosen.out_of_fold, positive[train]).probabilities(scores)
        values.append(figure_values(scores, probabilities, positive[test]))
    draws, seed = bench.config.draws, bench.config.seed
    return ProbeFigures(*(interval_of_mean(of_all, draws=draws, seed=seed) for of_all in np.stack(values, 1)))


def _as_probe(
    bench: _Bench, task: _Task, fit: LinearFit, calibration: Calibration, model: Model, sae: SAE | None
) -> Probe:
    about = About(
        method=task.method,
        hook_name=task.hook_name,
        position=bench.config.position,
        max_tokens=bench.config.max_tokens,
        classes=bench.data.classes,
        bias=fit.bias,
        slope=calibration.slope,
        offset=calibration.offset,
        mean_norm=task.mean_norm,
        model_name=model.name,
        model_sha256=model.weights_sha256,
    )
    direction = torch.from_numpy(fit.direction).float()
    if not task.method.startswith("sae_k"):
        return Probe(about, direction)
    assert sae is not None
    features = direction.nonzero()[:, 0]
    weights = direction[features]
    return Probe(about, weights @ sae.W_dec.detach().float().cpu()[features], features, weights)


def _chosen(
    method: str,
    columns: Float[np.ndarray, "rows columns"],
    positive: Bool[np.ndarray, " rows"],
    folds: Sequence[Fold],
) -> Chosen:
    if method == "logistic":
        return best_logistic(columns, positive, folds=folds, quality=auroc_of)
    fitter = mean_difference_fit
    if method.startswith("sae_k"):
        fitter = partial(sparse_fit, k=int(method.removeprefix("sae_k")))
    return best_of([fitter], columns, positive, folds=folds, quality=auroc_of)
