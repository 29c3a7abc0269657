"""Runs: the trainings under the root, their curves over each other, what sets them apart, and sweeps as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from saelab.metrics import METRICS
from saelab_explorer import curves, frame, logs, snippets
from saelab_explorer.figures import count, plural
from saelab_explorer.logs import Log, Sweep

#: Curves that one picture can keep apart, and pictures that a page can hold.
MOST_LOGS, MOST_METRICS = 6, 8
FIRST_LOGS, FIRST_METRICS = 4, 4

#: Settings listed where they differ.
MOST_SETTINGS = 40

#: Columns of a sweep's table and how they are written.
SWEEP_COLUMNS: Mapping[str, str] = {
    "d_sae": ",.0f",
    "tokens": ",.0f",
    "l0": ".1f",
    "reconstruction": ".4f",
    "loss": ".4g",
    "n_dead": ",.0f",
    "decoder_projection": ".4f",
}


def show() -> None:
    known, sweeps = logs.find_logs(frame.root()), logs.find_sweeps(frame.root())
    sub = f"{plural(len(known), 'training')} under {frame.root()}" + (
        f", {plural(len(sweeps), 'sweep')}" * bool(sweeps)
    )
    if not known:
        frame.show_address()
        snippets.draw(snippets.heading("Runs", kicker="Train", sub=sub))
        why = f"No stage under {frame.root()} has written a metrics.jsonl. Train one with this command, then reload."
        frame.gap("There is no training here yet", why, f"saelab demo --out {frame.root() / 'demo'}")
    chosen = _asked(known)
    metrics = st.query_params.get_all("metric")[:MOST_METRICS]
    frame.show_address({"log": [log.name for log in chosen], "metric": metrics})
    snippets.draw(snippets.heading("Runs", kicker="Train", sub=sub))
    _choice(known, chosen)
    if chosen:
        under_way = any(not log.finished for log in chosen)
        st.fragment(_curves, run_every=5.0 if under_way else None)([log.name for log in chosen], metrics)
        _differences(chosen)
    else:
        snippets.draw(snippets.empty("Nothing is chosen", "Choose one training, or several to compare, above."))
    for sweep in sweeps.values():
        _sweep(sweep, known)
    _all(known)


def _asked(known: Mapping[str, Log]) -> list[Log]:
    """The logs of the address; without any the first ones of the open run. A wrong name ends the page with a way on."""
    names = list(dict.fromkeys(st.query_params.get_all("log")))[:MOST_LOGS]
    for name in names:
        if name not in known:
            other = next(iter(known))
            sentence = f"There is no training {name[:60]!r} under {frame.root()}"
            frame.dead_end(sentence, frame.TRAININGS, f"Show {other}", {"log": other})
    if names or "log_choice" in st.session_state:  # an emptied choice stays empty
        return [known[name] for name in names]
    own = [name for name in known if name.split("/")[0] == frame.run_name()] or list(known)
    trained = [name for name in own if known[name].stage != "activations"] or own
    return [known[name] for name in trained[:FIRST_LOGS]]


def _choice(known: Mapping[str, Log], chosen: Sequence[Log]) -> None:
    st.session_state["log_choice"] = [log.name for log in chosen]
    st.multiselect(
        f"Trainings to compare, up to {MOST_LOGS}",
        list(known),
        key="log_choice",
        max_selections=MOST_LOGS,
        format_func=lambda name: f"{name}  ·  {known[name].kind or known[name].stage}",
        on_change=lambda: frame.change_address({"log": st.session_state["log_choice"], "metric": None}),
        placeholder="choose a training",
    )


def _curves(names: Sequence[str], metrics: Sequence[str]) -> None:
    """Read anew by its own timer while a training writes."""
    known = logs.find_logs(frame.root())
    chosen = [known[name] for name in names if name in known]
    lines = [_lines(log) for log in chosen]
    held = logs.metric_names(lines)
    shown = [metric for metric in metrics if metric in held] or held[:FIRST_METRICS]
    st.session_state["metric_choice"] = shown
    st.multiselect(
        "Metrics",
        held,
        key="metric_choice",
        max_selections=MOST_METRICS,
        on_change=lambda: frame.change_address({"metric": st.session_state["metric_choice"]}),
        placeholder="choose a metric",
    )
    snippets.draw(snippets.series([_called(log) for log in chosen]))
    clock = logs.common_clock(lines)
    pictures = {
        metric: curves.compared(
            [curves.Line(log.name, logs.points(one, metric, clock)) for log, one in zip(chosen, lines, strict=True)],
            metric,
            clock,
            frame.palette(),
        )
        for metric in shown
    }
    columns = st.columns(2, gap="large")
    for i, (metric, spec) in enumerate(pictures.items()):
        with columns[i % 2]:
            if spec is None:
                snippets.draw(snippets.note(f"{metric}: no curve yet, fewer than two lines of the logs hold it."))
                continue
            st.vega_lite_chart(spec=spec, key=f"metric_{metric}", width="stretch")
            if metric in METRICS:
                known_metric = METRICS[metric]
                better = "" if known_metric.better == "neither" else f"; {known_metric.better} is better"
                snippets.draw(snippets.note(f"{known_metric.meaning} ({known_metric.unit}{better})"))


def _lines(log: Log) -> list[dict[str, Any]]:
    return _lines_of_size(log, str(log.path), (log.path / "metrics.jsonl").stat().st_size)


@st.cache_resource(show_spinner=False, max_entries=32)
def _lines_of_size(_log: Log, path: str, size: int) -> list[dict[str, Any]]:
    return _log.lines()  # read anew where path or size is another one; what has an underscore does not count


def _called(log: Log) -> str:
    return f"{log.name}{'' if log.finished else ' (under way, or stopped)'}"


def _differences(chosen: Sequence[Log]) -> None:
    if len(chosen) < 2:
        return
    differing = logs.differing(chosen)
    snippets.draw(snippets.section("What sets them apart", f"{plural(len(differing), 'setting')}"))
    if not differing:
        snippets.draw(snippets.note("All settings are the same."))
        return
    rows = [(name, *values) for name, values in list(differing.items())[:MOST_SETTINGS]]
    snippets.draw(snippets.chain(("setting", *(log.name for log in chosen)), rows))
    if len(differing) > MOST_SETTINGS:
        snippets.draw(snippets.note(f"{len(differing) - MOST_SETTINGS} more are left out."))


def _sweep(sweep: Sweep, known: Mapping[str, Log]) -> None:
    snippets.draw(snippets.section(f"Sweep {sweep.name}", plural(len(sweep.members), "member")))
    spec = curves.frontier(sweep.members, frame.palette())
    picture, table = st.columns([2, 3], gap="large")
    with picture:
        if spec is None:
            snippets.draw(snippets.note("No picture: fewer than two members have an L0 and an error."))
        else:
            st.vega_lite_chart(spec=spec, key=f"sweep_{sweep.name}", width="stretch")
            snippets.draw(snippets.note("The lower left is best. Numbers are those of the last line of each log."))
    with table:
        columns = [name for name in SWEEP_COLUMNS if any(row.get(name) is not None for row in sweep.members)]
        rows = [
            (
                str(row.get("name", "")),
                *(_cell(row.get(name), SWEEP_COLUMNS[name]) for name in columns),
                str(row.get("state", "")),
            )
            for row in sweep.members
        ]
        snippets.draw(snippets.chain(("member", *columns, "state"), rows))
        members = [name for row in sweep.members if (name := f"{sweep.name}/{row.get('name')}") in known][:MOST_LOGS]
        if members:
            st.button(
                f"Compare {plural(len(members), 'curve')}",
                key=f"compare_{sweep.name}",
                on_click=frame.change_address,
                args=({"log": members, "metric": None},),
            )


def _cell(value: object, written: str) -> str:
    return format(value, written) if isinstance(value, (int, float)) else "–"


def _all(known: Mapping[str, Log]) -> None:
    snippets.draw(snippets.section("All trainings"))
    rows = [
        (
            log.name,
            log.stage,
            log.kind,
            log.started.replace("T", " ")[:16],
            "finished" if log.finished else "unfinished",
            *_size(log),
        )
        for log in known.values()
    ]
    snippets.draw(snippets.chain(("name", "stage", "kind", "begun", "state", "steps", "tokens"), rows))


def _size(log: Log) -> tuple[str, str]:
    lines = _lines(log)
    last = lines[-1] if lines else {}
    return tuple(count(last[name]) if isinstance(last.get(name), (int, float)) else "–" for name in logs.CLOCKS)  # type: ignore[return-value]


show()
