"""Sparse probing: can a label be read off one feature, two, five?

A probe is a logistic regression on the mean activation of a text. It sees the k features (or, as a baseline, the k
coordinates of the residual stream) whose mean differs most between the classes. Sources: Gurnee et al. 2023, arXiv
2305.01610, for k-sparse probes; Karvonen et al. 2025, arXiv 2503.09532, section 4.4, for the choice of the k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from saelab.errors import ConfigError
from saelab.evals.labelled import Labelled, Task, read, tasks
from saelab.evals.piece import Piece, Score
from saelab.interp.labelled_files import LabelledFile
from saelab.interp.linear_fits import LinearFit, best_logistic, sparse_fit
from saelab.interp.pooled_acts import PooledActs, pooled_acts
from saelab.models.load import Model
from saelab.sae.base import SAE
from saelab.stats import Interval, bootstrap_mean

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class ProbingConfig:
    """Sparse probing."""

    data: tuple[LabelledFile, ...] = ()
    """Local files of texts with labels; without any, sparse probing is left out."""
    texts: int = 1000
    """Texts of each file, at most; half of them train the probes, half test them."""
    classes: int = 6
    """Classes of a file that are told from the others, at most."""
    max_tokens: int = 64
    """Of longer texts only the beginning is read."""
    ks: tuple[int, ...] = (1, 2, 5)
    """Numbers of features that a probe may see."""

    def __post_init__(self) -> None:
        for name in ("texts", "classes", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"probing.{name} must be at least 1, got {getattr(self, name)}; raise it")
        if not self.ks or min(self.ks) < 1:
            raise ConfigError(f"probing.ks must be numbers of at least 1, got {list(self.ks)}; 1, 2, 5 are usual")


def probing(
    sae: SAE,
    model: Model,
    config: ProbingConfig,
    *,
    draws: int,
    seed: int,
    batch_texts: int = 16,
    progress: Progress | None = None,
) -> Piece:
    """Accuracy and F1 of k-sparse probes on features, beside those on coordinates and the probe on all coordinates.

    Means over all tasks, and the accuracy on each file by itself. For the intervals each task's test texts are
    resampled; the tasks of a file of several classes share texts, which that does not see.

    Raises:
        TextError: a file that cannot be read.
    """
    sets = [read(file, max_texts=config.texts, max_classes=config.classes, seed=seed) for file in config.data]
    n_all, n_done, n_tokens = sum(len(data.texts) for data in sets), 0, 0
    results: dict[str, dict[str, list[np.ndarray]]] = {}
    n_test: dict[str, int] = {}
    for data in sets:
        means = pooled_acts(
            model,
            data.texts,
            [sae.metadata.hook_name],
            position="mean",
            max_tokens=config.max_tokens,
            sae=sae,
            batch_texts=batch_texts,
            progress=_shifted(progress, n_done, n_all),
        )
        n_done += len(data.texts)
        n_tokens += means.n_tokens
        results[data.name], n_test[data.name] = _results(data, means, sae.metadata.hook_name, config, seed=seed)
    scores = _scores(results, n_test, draws=draws, seed=seed)
    note = (
        f"{sum(n_test.values()):,} test texts of {sum(len(r['all coordinates']) for r in results.values())} tasks, "
        f"{n_tokens:,} tokens read. Guessing is right half of the time, because every task is balanced."
    )
    return Piece(name="probing", scores=scores, notes=(note,))


def dense_probe(columns: Float[np.ndarray, "rows columns"], positive: Bool[np.ndarray, " rows"]) -> LinearFit:
    """Logistic regression on many columns: the penalty is the one of three with the best F1 in 4-fold cross-validation
    on these rows, because a baseline that overfits would flatter what stands beside it.

    Raises:
        ValueError: fewer than 4 rows of a class.
    """
    from sklearn.model_selection import StratifiedKFold

    def f1_of(scores: Float[np.ndarray, " held"], truth: Bool[np.ndarray, " held"]) -> float:
        return float(f1(outcomes(scores > 0, truth).sum(0, keepdims=True))[0])

    folds = list(StratifiedKFold(4).split(columns, positive))
    return best_logistic(columns, positive, folds=folds, quality=f1_of).fit


def outcomes(says: Bool[np.ndarray, " rows"], positive: Bool[np.ndarray, " rows"]) -> Float[np.ndarray, "rows 4"]:
    """What each row adds to: right answers, rows, true positives, and the mean of claimed and real positives."""
    return np.column_stack(
        [says == positive, np.ones(len(says)), says & positive, (says.astype(float) + positive) / 2]
    ).astype(float)


def accuracy(sums: Float[np.ndarray, "draws 4"]) -> Float[np.ndarray, " draws"]:
    return sums[:, 0] / sums[:, 1]


def f1(sums: Float[np.ndarray, "draws 4"]) -> Float[np.ndarray, " draws"]:
    """Harmonic mean of precision and recall; 0 where nothing is claimed and nothing is there."""
    return sums[:, 2] / np.maximum(sums[:, 3], 0.5)


def _results(
    data: Labelled, means: PooledActs, hook_name: str, config: ProbingConfig, *, seed: int
) -> tuple[dict[str, list[np.ndarray]], int]:
    """Outcomes on the test texts of each task, by probe; and the number of these texts."""
    assert means.feature_acts is not None
    acts = means.acts[hook_name]
    found: dict[str, list[np.ndarray]] = {}
    n_test = 0
    for task in tasks(data, seed=seed):
        n_test += len(task.test)
        for k in config.ks:
            found.setdefault(f"SAE features, k = {k}", []).append(_outcome(means.feature_acts, task, k))
        for k in config.ks:
            found.setdefault(f"coordinates, k = {k}", []).append(_outcome(acts, task, k))
        found.setdefault("all coordinates", []).append(_outcome(acts, task, None))
    return found, n_test


def _outcome(columns: Float[np.ndarray, "texts columns"], task: Task, k: int | None) -> Float[np.ndarray, "test 4"]:
    train, test = (np.array([number in task.positive for number in numbers]) for numbers in (task.train, task.test))
    probe = dense_probe(columns[task.train], train) if k is None else sparse_fit(columns[task.train], train, k=k)
    return outcomes(probe.says(columns[task.test]), test)


def _scores(
    results: dict[str, dict[str, list[np.ndarray]]], n_test: dict[str, int], *, draws: int, seed: int
) -> tuple[Score, ...]:
    def mean(strata: list[np.ndarray], metric: str) -> Interval:
        return bootstrap_mean(accuracy if metric == "probe_accuracy" else f1, strata, draws=draws, seed=seed)

    probes = list(next(iter(results.values())))
    scores = [
        Score(metric, probe, mean([s for by in results.values() for s in by[probe]], metric), n, "texts")
        for n in [sum(n_test.values())]
        for metric in ("probe_accuracy", "probe_f1")
        for probe in probes
    ]
    scores += [
        Score("probe_accuracy", f"{name}: {probe}", mean(strata, "probe_accuracy"), n_test[name], "texts")
        for name, by in results.items()
        if len(results) > 1
        for probe, strata in by.items()
    ]
    return tuple(scores)


def _shifted(progress: Progress | None, n_before: int, n_all: int) -> Progress | None:
    return None if progress is None else lambda done, total, detail: progress(n_before + done, n_all, detail)
