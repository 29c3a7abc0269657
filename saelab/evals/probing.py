"""Sparse probing: can a label be read off one feature, two, five?

A probe is a logistic regression on the mean activation of a text. It sees the k features (or, as a baseline, the k
coordinates of the residual stream) whose mean differs most between the classes. Sources: Gurnee et al. 2023, arXiv
2305.01610, for k-sparse probes; Karvonen et al. 2025, arXiv 2503.09532, section 4.4, for the choice of the k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from saelab.errors import ConfigError, TextError
from saelab.evals.labelled import Labelled, LabelledFile, Task, read, tasks
from saelab.evals.piece import Piece, Score
from saelab.models.load import Model
from saelab.models.tokens import behind_first, right_padded
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


class TextMeans(NamedTuple):
    """Means over the tokens of each text, BOS not counted."""

    feature_acts: Float[np.ndarray, "texts d_sae"]
    acts: Float[np.ndarray, "texts d_in"]
    n_tokens: int


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
        means = text_means(
            sae,
            model,
            data.texts,
            max_tokens=config.max_tokens,
            batch_texts=batch_texts,
            progress=_shifted(progress, n_done, n_all),
        )
        n_done += len(data.texts)
        n_tokens += means.n_tokens
        results[data.name], n_test[data.name] = _results(data, means, config, seed=seed)
    scores = _scores(results, n_test, draws=draws, seed=seed)
    note = (
        f"{sum(n_test.values()):,} test texts of {sum(len(r['all coordinates']) for r in results.values())} tasks, "
        f"{n_tokens:,} tokens read. Guessing is right half of the time, because every task is balanced."
    )
    return Piece(name="probing", scores=scores, notes=(note,))


@torch.inference_mode()
def text_means(
    sae: SAE,
    model: Model,
    texts: Sequence[str],
    *,
    max_tokens: int,
    batch_texts: int,
    progress: Progress | None = None,
) -> TextMeans:
    """What the SAE and the hook that it reads make of each text, averaged over its tokens.

    Raises:
        TextError: a text without a token.
    """
    hook_name = sae.metadata.hook_name
    feature_acts = torch.zeros(len(texts), sae.d_sae)
    acts = torch.zeros(len(texts), sae.d_in)
    n_tokens = 0
    for start in range(0, len(texts), batch_texts):
        rows = [[model.bos_id, *model.encode(text)[:max_tokens]] for text in texts[start : start + batch_texts]]
        if min(map(len, rows)) < 2:
            raise TextError(f"{texts[start + int(np.argmin([len(r) for r in rows]))]!r} has no token; drop that text")
        ids, mask = right_padded(rows, pad_id=model.pad_id)
        keep = behind_first(mask).to(model.device)
        seen = model.capture(ids, [hook_name], mask)[hook_name][keep].float()
        owner = keep.nonzero()[:, 0]
        codes = sae.sparse_codes(seen)
        stop = start + len(rows)
        counts = keep.sum(1, keepdim=True)
        sums = torch.zeros(len(rows) * sae.d_sae, device=seen.device)
        sums.index_add_(0, owner[codes.rows] * sae.d_sae + codes.features, codes.values.float())
        feature_acts[start:stop] = (sums.view(len(rows), -1) / counts).cpu()
        acts[start:stop] = (torch.zeros(len(rows), sae.d_in).to(seen).index_add_(0, owner, seen) / counts).cpu()
        n_tokens += int(counts.sum())
        if progress:
            progress(stop, len(texts), "texts")
    return TextMeans(feature_acts.numpy(), acts.numpy(), n_tokens)


def largest_differences(
    columns: Float[np.ndarray, "rows columns"], positive: Bool[np.ndarray, " rows"], k: int
) -> Int[np.ndarray, " k"]:
    """The k columns whose mean differs most between the positive and the other rows, the largest difference first."""
    difference = np.abs(columns[positive].mean(0) - columns[~positive].mean(0))
    return np.argsort(-difference, kind="stable")[:k]


class Probe(NamedTuple):
    """A logistic regression: positive where ``columns @ direction + bias > 0``."""

    direction: Float[np.ndarray, " columns"]
    bias: float

    def says(self, columns: Float[np.ndarray, "rows columns"]) -> Bool[np.ndarray, " rows"]:
        return columns @ self.direction + self.bias > 0


def fitted_probe(columns: Float[np.ndarray, "rows columns"], positive: Bool[np.ndarray, " rows"]) -> Probe:
    """Logistic regression on a few columns brought to variance 1, classes weighted equally, with a ridge penalty of
    weight 1 (scikit-learn's C = 1).

    Raises:
        ValueError: only one class in ``positive``.
    """
    from sklearn.linear_model import LogisticRegression

    return _on_unit_variance(LogisticRegression(C=1.0, class_weight="balanced", max_iter=5000), columns, positive)


def dense_probe(columns: Float[np.ndarray, "rows columns"], positive: Bool[np.ndarray, " rows"]) -> Probe:
    """`fitted_probe` on many columns: the penalty is the one of three (C = 0.01, 0.1, 1) with the best F1 in 4-fold
    cross-validation on these rows, because a baseline that overfits would flatter what stands beside it.

    Raises:
        ValueError: fewer than 4 rows of a class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    regression = LogisticRegression(class_weight="balanced", max_iter=5000)
    search = GridSearchCV(regression, {"C": [0.01, 0.1, 1.0]}, scoring="f1", cv=StratifiedKFold(4))
    return _on_unit_variance(search, columns, positive)


def _on_unit_variance(
    estimator: Any, columns: Float[np.ndarray, "rows columns"], positive: Bool[np.ndarray, " rows"]
) -> Probe:
    """A fit on centred columns of variance 1, as a probe of the columns as they are."""
    mean, spread = columns.mean(0), columns.std(0)
    spread = np.where(spread > 0, spread, 1)
    fit = estimator.fit((columns - mean) / spread, positive)
    regression = getattr(fit, "best_estimator_", fit)
    direction = regression.coef_[0] / spread
    return Probe(direction, float(regression.intercept_[0] - direction @ mean))


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
    data: Labelled, means: TextMeans, config: ProbingConfig, *, seed: int
) -> tuple[dict[str, list[np.ndarray]], int]:
    """Outcomes on the test texts of each task, by probe; and the number of these texts."""
    found: dict[str, list[np.ndarray]] = {}
    n_test = 0
    for task in tasks(data, seed=seed):
        n_test += len(task.test)
        for k in config.ks:
            found.setdefault(f"SAE features, k = {k}", []).append(_outcome(means.feature_acts, task, k))
        for k in config.ks:
            found.setdefault(f"coordinates, k = {k}", []).append(_outcome(means.acts, task, k))
        found.setdefault("all coordinates", []).append(_outcome(means.acts, task, None))
    return found, n_test


def _outcome(columns: Float[np.ndarray, "texts columns"], task: Task, k: int | None) -> Float[np.ndarray, "test 4"]:
    train, test = (np.array([number in task.positive for number in numbers]) for numbers in (task.train, task.test))
    chosen = slice(None) if k is None else largest_differences(columns[task.train], train, k)
    probe = (dense_probe if k is None else fitted_probe)(columns[task.train][:, chosen], train)
    return outcomes(probe.says(columns[task.test][:, chosen]), test)


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
