"""A study of probes as plain data, and as tables and sentences to read: every figure beside both its controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from saelab.interp.probe_scores import ProbeFigures
from saelab.interp.probes import ProbeResult, ProbeStudy
from saelab.metrics import METRICS
from saelab.models.hooks import layer_of


class ProbeTable(NamedTuple):
    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def to_json(study: ProbeStudy) -> dict[str, Any]:
    """The content of probe.json; ``best`` and each ``directory`` are relative to it."""
    data, parts = study.data, study.parts
    test_positive = data.positive[parts.test]
    return {
        "data": {
            "name": data.name,
            "classes": list(data.classes),
            "n_texts": len(data.texts),
            "n_positive": int(data.positive.sum()),
            "n_groups": data.n_groups,
            "grouped_by": data.grouped_by,
            "n_train": len(parts.train),
            "n_test": len(parts.test),
            "n_test_positive": int(test_positive.sum()),
            "n_test_groups": len(set(data.groups[parts.test].tolist())),
            "n_tokens": study.n_tokens,
            "n_cut": study.n_cut,
        },
        "words": _plain(study.words),
        "best": directory_of(study.best),
        "probes": [
            {
                "directory": directory_of(result),
                "method": result.probe.about.method,
                "hook_name": result.probe.hook_name,
                "layer": layer_of(result.probe.hook_name),
                "position": result.probe.about.position,
                "validation_auroc": result.validation_auroc,
                "figures": _plain(result.figures),
                "shuffled": _plain(result.shuffled),
                "over_words": result.over_words._asdict(),
            }
            for result in study.results
        ],
    }


def directory_of(result: ProbeResult) -> str:
    """Where a probe is kept within the stage directory."""
    return f"probes/{result.probe.name}"


def sentences(content: Mapping[str, Any]) -> list[str]:
    """What was measured, on what, and which probe was chosen; of the content of probe.json."""
    data = content["data"]
    n_other = data["n_test"] - data["n_test_positive"]
    lines = [
        f"{data['name']}: {data['classes'][1]!r} against {data['classes'][0]!r}; {data['n_texts']:,} texts "
        f"({data['n_positive']:,} positive) in {data['n_groups']:,} groups, {data['n_tokens']:,} tokens; position "
        f"{content['probes'][0]['position']!r}. {data['n_train']:,} texts train, {data['n_test']:,} of other groups "
        "test.",
        f"Groups: {data['grouped_by']}.",
        "Intervals are 95 % bootstrap intervals over the groups of the test texts; of shuffled labels over the "
        "permutations.",
    ]
    if n_other < 100:
        lines.append(
            f"With {n_other} test texts of the other class, 1 % false alarms means none: recall is that above the "
            "highest of them."
        )
    if data["n_cut"]:
        lines.append(f"Of {data['n_cut']:,} longer texts only the beginning was read.")
    best = next(probe for probe in content["probes"] if probe["directory"] == content["best"])
    lines.append(
        f"Best in validation (folds of the training texts): {best['method']} at {best['hook_name']}, AUROC "
        f"{best['validation_auroc']:.3f}; on the test texts {_interval(best['figures']['auroc'])}, the bag of words "
        f"{_interval(content['words']['auroc'])}, shuffled labels {_interval(best['shuffled']['auroc'])}."
    )
    return lines


def tables(content: Mapping[str, Any]) -> list[ProbeTable]:
    """One table a figure, of the content of probe.json."""
    return [_table(content, name) for name in ProbeFigures._fields]


def _table(content: Mapping[str, Any], name: str) -> ProbeTable:
    header: tuple[str, ...] = ("method", "hook", "value", "95 % interval", "shuffled labels", "bag of words")
    rows = []
    for probe in content["probes"]:
        own = probe["figures"][name]
        row: tuple[str, ...] = (
            probe["method"],
            probe["hook_name"],
            f"{own['value']:.3f}",
            f"{own['low']:.3f} to {own['high']:.3f}",
            _interval(probe["shuffled"][name]),
            _interval(content["words"][name]),
        )
        if name == "auroc":
            row += (_interval(probe["over_words"]), f"{probe['validation_auroc']:.3f}")
        rows.append(row)
    if name == "auroc":
        header += ("above the words", "in validation")
    metric = METRICS[name]
    return ProbeTable(f"{name}: {metric.meaning}; {metric.better} is better", header, rows)


def _interval(plain: Mapping[str, float]) -> str:
    return f"{plain['value']:.3f} ({plain['low']:.3f} to {plain['high']:.3f})"


def _plain(figures: ProbeFigures) -> dict[str, dict[str, float]]:
    return {name: interval._asdict() for name, interval in figures._asdict().items()}
