"""An evaluation as a page to read: Markdown for a terminal or a repository, HTML with pictures for a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any, NamedTuple

from saelab.evals.drawing import Row, histogram, interval_plot
from saelab.evals.piece import Piece, Score
from saelab.metrics import METRICS
from saelab.stats import Interval

TITLES = {
    "baselines": "Explained variance without an SAE",
    "controls": "The same SAE where there is nothing to find",
    "probing": "Sparse probing",
    "absorption": "First-letter absorption and feature splitting",
    "stability": "Stability across seeds",
    "meta": "Shared structure of the features",
}


class Table(NamedTuple):
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


class Section(NamedTuple):
    """A heading with what stands below it; ``pictures`` are SVG."""

    title: str
    tables: tuple[Table, ...] = ()
    sentences: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()


def sections(result: Mapping[str, Any]) -> Iterator[Section]:
    """The content of eval.json, for reading."""
    about = result["about"]
    yield Section(
        f"{about['sae']}",
        sentences=(
            f"{about['arch']}, {about['d_sae']:,} features, reads {about['hook_name']} of {about['model']}; "
            f"text: {about['text']}.",
            f"{result['n_tokens']:,} held-out tokens in {result['n_sequences']} sequences, {result['n_outliers']} of "
            "outlying norm. Intervals are 95 % bootstrap intervals over sequences, or over what is counted.",
        ),
    )
    yield _core(result)
    if result["differences"]:
        yield _comparison(result["differences"])
    for plain in result["pieces"]:
        yield _of_piece(Piece.from_json(plain))


def markdown(result: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    return as_markdown(list(sections(result)))


def html(result: Mapping[str, Any]) -> str:
    """The report as one file that needs no other."""
    return as_html(list(sections(result)), title=f"saelab eval {result['about']['sae']}")


def as_markdown(parts: Sequence[Section]) -> str:
    """Sections as Markdown, without their pictures; the first gives the title."""
    lines: list[str] = []
    for number, section in enumerate(parts):
        lines += [f"{'#' if number == 0 else '##'} {section.title}", ""]
        for table in section.tables:
            lines += ["| " + " | ".join(table.header) + " |", "|" + "---|" * len(table.header)]
            lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in table.rows]
            lines.append("")
        for sentence in section.sentences:
            lines += [sentence, ""]
    return "\n".join(lines)


def as_html(parts: Sequence[Section], *, title: str) -> str:
    """Sections as one file that needs no other; the first gives the heading."""
    body = []
    for number, section in enumerate(parts):
        tag = "h1" if number == 0 else "h2"
        body.append(f"<{tag}>{escape(section.title)}</{tag}>")
        body += [f"<p>{escape(sentence)}</p>" for sentence in section.sentences]
        body += [_html_table(table) for table in section.tables]
        body += section.pictures
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body>{''.join(body)}</body></html>\n"
    )


def _core(result: Mapping[str, Any]) -> Section:
    metrics = result["metrics"]
    intervals = {name: Interval(*(metrics[name][part] for part in Interval._fields)) for name in metrics}
    shares = [Row(name, interval) for name, interval in intervals.items() if METRICS[name].unit == "share"]
    density = result["log10_density"]
    return Section(
        "Faithfulness",
        tables=(
            Table(
                ("metric", "value", "95 % interval", "unit", "meaning"),
                [
                    (name, _number(i.value), _range(i), METRICS[name].unit, METRICS[name].meaning)
                    for name, i in intervals.items()
                ],
            ),
        ),
        sentences=(f"{density['n_dead']:,} features did not fire once; the histogram is of the others.",),
        pictures=(
            interval_plot(shares, unit="share"),
            histogram(density["edges"], density["counts"], unit="log10 of the share of tokens"),
        ),
    )


def _comparison(differences: Sequence[Mapping[str, Any]]) -> Section:
    rows = [
        (
            entry["against"],
            entry["metric"],
            f"{entry['value']:+.4g}",
            f"{entry['low']:+.4g} to {entry['high']:+.4g}",
            entry["verdict"],
        )
        for entry in differences
    ]
    return Section(
        "Beside other SAEs",
        tables=(Table(("against", "metric", "difference", "95 % interval", "this SAE is"), rows),),
        sentences=(
            "Differences are this SAE minus the other, over the same sequences. One whose interval reaches zero is not "
            "ranked. The intervals cover the choice of text, not the seed of the training; of twenty differences that "
            "are truly zero, one is expected to be ranked all the same.",
        ),
    )


def _of_piece(piece: Piece) -> Section:
    title = TITLES[piece.name]
    if piece.skipped is not None:
        return Section(title, sentences=(f"Not run: {piece.skipped}.",))
    has_control = any(score.control is not None for score in piece.scores)
    header = ("metric", "of", "value", "95 % interval", "measured on")
    rows = [
        (
            score.metric,
            score.label,
            _number(score.interval.value),
            _range(score.interval),
            f"{score.n:,} {score.counted}",
            *([_control(score)] if has_control else []),
        )
        for score in piece.scores
    ]
    pictures = tuple(
        interval_plot([Row(s.label or s.metric, s.interval, s.control) for s in group], unit=unit)
        for unit, group in _grouped(piece.scores, lambda score: f"{score.metric}, {METRICS[score.metric].unit}")
    )
    return Section(
        title,
        tables=(Table((*header, "random weights") if has_control else header, rows),),
        sentences=piece.notes,
        pictures=pictures,
    )


def _grouped(scores: Sequence[Score], key: Callable[[Score], str]) -> Iterator[tuple[str, list[Score]]]:
    return ((name, list(group)) for name, group in groupby(sorted(scores, key=key), key=key))


def _control(score: Score) -> str:
    if score.control is None:
        return "none"
    return f"{_number(score.control.value)} ({_range(score.control)})"


def _number(value: float) -> str:
    return f"{value:.4g}"


def _range(interval: Interval) -> str:
    return f"{_number(interval.low)} to {_number(interval.high)}"


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --page: #ffffff; --rule: #d5dae1; --own: #2b62c4;
  --control: #c4622b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --page: #14181f; --rule: #3a424e; --own: #7aa7f5; } }
body { color: var(--ink); background: var(--page); font: 15px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
svg { width: 100%; margin: .8rem 0; }
text { font: 12px system-ui, sans-serif; fill: var(--ink); } .tick { opacity: .7; }
line.axis { stroke: var(--rule); } line.own { stroke: var(--own); stroke-width: 2; }
line.control { stroke: var(--control); stroke-width: 2; } circle.own { fill: var(--own); }
circle.control { fill: var(--page); stroke: var(--control); stroke-width: 2; } rect.bar { fill: var(--own); }
"""
