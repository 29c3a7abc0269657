"""The members of a sweep side by side on held-out text: every number of the core with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from saelab.activations.store import ActivationStore
from saelab.config import to_mapping
from saelab.errors import ArtifactError
from saelab.evals.drawing import Row, interval_plot
from saelab.evals.reconstruction import EvalConfig, Evaluation, Progress, hooks, measure, report, summarise
from saelab.evals.report import Section, Table, as_html, as_markdown
from saelab.models.load import Model
from saelab.sae.base import SAE
from saelab.stats import Interval

#: Columns of the table, by their names in saelab/metrics.py.
COLUMNS = ("l0", "explained_variance", "ce_recovered", "dead_fraction")


class MemberResult(NamedTuple):
    """What was found of one SAE of a sweep."""

    name: str
    arch: str
    evaluation: Evaluation | None
    skipped: str | None = None
    """Why there is no evaluation."""


def evaluate_members(
    saes: Mapping[str, SAE],
    store: ActivationStore,
    model: Model,
    config: EvalConfig,
    *,
    progress: Progress | None = None,
) -> list[MemberResult]:
    """Evaluate all of ``saes`` on the same held-out sequences, in their order.

    SAEs of one hook share the forward passes that have none of them in it, so a further one costs one pass.

    Raises:
        ArtifactError: the store holds no held-out text, or not the hook of an SAE.
    """
    places: dict[str, tuple[str, str]] = {}
    skipped: dict[str, str] = {}
    for name, sae in saes.items():
        try:
            places[name] = hooks(sae)
        except ArtifactError as error:  # of a crosscoder
            skipped[name] = str(error)
    found: dict[str, Evaluation] = {}
    for _, group in groupby(sorted(places, key=lambda name: places[name]), key=lambda name: places[name]):
        names = list(group)
        sums = measure([saes[name] for name in names], store, model, config, progress=progress)
        found |= {name: summarise(one, config) for name, one in zip(names, sums, strict=True)}
    return [MemberResult(name, sae.cfg.arch, found.get(name), skipped.get(name)) for name, sae in saes.items()]


def to_json(results: Sequence[MemberResult], config: EvalConfig) -> dict[str, Any]:
    """Plain data for members.json."""
    entries = [
        {"name": result.name, "arch": result.arch, "skipped": result.skipped}
        | (report(result.evaluation) if result.evaluation else {})
        for result in results
    ]
    return {"members": entries, "config": to_mapping(config)}


def as_rows(results: Sequence[MemberResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: each metric with its 95 % interval."""
    rows = []
    for result in results:
        if result.evaluation is None:
            rows.append([result.name, *["-"] * len(COLUMNS)])
        else:
            rows.append([result.name, *(_shown(name, result.evaluation.metrics[name]) for name in COLUMNS)])
    return ["SAE", *COLUMNS], rows


def sentences(results: Sequence[MemberResult]) -> list[str]:
    """What the numbers were measured on, and what was left out."""
    measured = [result.evaluation for result in results if result.evaluation]
    said = [f"{result.name} is not in the table: {result.skipped}." for result in results if result.skipped]
    if measured:
        one = measured[0]
        said.insert(
            0,
            f"{one.n_tokens:,} held-out tokens in {one.n_sequences} sequences, the same for all; in brackets 95 % "
            "bootstrap intervals over sequences (dead_fraction: over features). SAEs whose intervals overlap are not "
            "ranked by them: saelab eval --against gives the interval of a difference.",
        )
    return said


def members_markdown(results: Sequence[MemberResult]) -> str:
    return as_markdown(_sections(results))


def members_html(results: Sequence[MemberResult]) -> str:
    return as_html(_sections(results), title="The members of a sweep")


def _sections(results: Sequence[MemberResult]) -> list[Section]:
    header, rows = as_rows(results)
    measured = [(result.name, result.evaluation) for result in results if result.evaluation]
    pictures = [
        interval_plot([Row(name, evaluation.metrics[metric]) for name, evaluation in measured], unit=metric)
        for metric in COLUMNS
        if measured
    ]
    return [
        Section(
            "The members of the sweep",
            tables=(Table(tuple(header), [tuple(row) for row in rows]),),
            sentences=tuple(sentences(results)),
            pictures=tuple(pictures),
        )
    ]


def _shown(name: str, interval: Interval) -> str:
    digits = 1 if name == "l0" else 4
    return f"{interval.value:.{digits}f} ({interval.low:.{digits}f} to {interval.high:.{digits}f})"
