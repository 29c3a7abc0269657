"""The table of a toy suite: for a terminal, and as pages to read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from saelab.config import to_mapping
from saelab.evals.drawing import Row, interval_plot
from saelab.evals.report import Section, Table, as_html, as_markdown
from saelab.evals.toy_suite import ToyResult, ToySuiteConfig
from saelab.stats import Interval

_COLUMNS: dict[str, Callable[[ToyResult], float]] = {
    "mean max cosine": lambda result: result.recovery.mean_max_cosine,
    "MCC": lambda result: result.recovery.mcc,
    "matched F1": lambda result: result.recovery.matched_f1,
    "L0": lambda result: result.l0,
    "explained variance": lambda result: result.explained_variance,
    "seconds": lambda result: result.seconds,
}


def to_json(results: Sequence[ToyResult], config: ToySuiteConfig) -> dict[str, Any]:
    """Plain data for eval.json: one entry for each training."""
    entries = [
        {
            "world": result.world,
            "arch": result.arch,
            "seed": result.seed,
            **result.recovery._asdict(),
            "l0": result.l0,
            "explained_variance": result.explained_variance,
            "seconds": result.seconds,
        }
        for result in results
    ]
    return {"suite": "toy", "results": entries, "config": to_mapping(config)}


def as_rows(results: Sequence[ToyResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: mean over seeds, and the range where there are several."""
    rows = [
        [world, arch, *(_shown([column(r) for r in group], name) for name, column in _COLUMNS.items())]
        for (world, arch), group in _by_setting(results)
    ]
    return ["world", "arch", *_COLUMNS], rows


def toy_markdown(results: Sequence[ToyResult], config: ToySuiteConfig) -> str:
    return as_markdown(_sections(results, config))


def toy_html(results: Sequence[ToyResult], config: ToySuiteConfig) -> str:
    return as_html(_sections(results, config), title="saelab eval --suite toy")


def _sections(results: Sequence[ToyResult], config: ToySuiteConfig) -> list[Section]:
    header, rows = as_rows(results)
    world = config.world
    pictures = []
    for name, group in groupby(_by_setting(results), key=lambda item: item[0][0]):
        values = {arch: [r.recovery.mcc for r in of_arch] for (_, arch), of_arch in group}
        plotted = [Row(arch, Interval(sum(v) / len(v), min(v), max(v))) for arch, v in values.items()]
        pictures.append(interval_plot(plotted, unit=f"MCC, {name}"))
    return [
        Section(
            "Architectures on known features",
            tables=(Table(tuple(header), [tuple(row) for row in rows]),),
            sentences=(
                f"{world.n_features} true features in {world.d} dimensions, L0 {world.l0:g}; SAEs of {config.d_sae} "
                f"features, {config.tokens:,} training tokens, peak learning rate {config.lr:g}, each at the world's "
                f"L0; {len(config.seeds)} seeds: mean, and in brackets the range.",
                "Transcoders and crosscoders read several activations a token and are not in the table.",
            ),
            pictures=tuple(pictures),
        )
    ]


def _by_setting(results: Sequence[ToyResult]) -> Iterator[tuple[tuple[str, str], list[ToyResult]]]:
    return ((key, list(group)) for key, group in groupby(results, key=lambda r: (r.world, r.arch)))


def _shown(values: Sequence[float], name: str) -> str:
    digits = {"seconds": 0, "L0": 2}.get(name, 3)
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
