"""The feature table: rows that open a feature, headings that sort, bars and small histograms inside the cells.

It is plain HTML, so that a screen reader and a test can read it, which a canvas grid would not allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import streamlit as st

_HERE = Path(__file__).parent
_mount = st.components.v2.component(
    "saelab.table",
    html="<table></table>",
    css=(_HERE / "table.css").read_text("utf-8"),
    js=(_HERE / "table.js").read_text("utf-8"),
)


@dataclass(frozen=True)
class Column:
    title: str
    kind: Literal["feature", "label", "quiet", "number", "tokens", "bar", "spark"]
    """What its cells hold: the feature's number; a label as (text, is it a token?) pairs; muted text; written numbers;
    a list of tokens; a mapping with ``text`` and ``share`` (0..1); counts of a histogram."""
    sort: str = ""
    """Name of the order that a click on the heading asks for; empty where it cannot be sorted."""
    priority: Literal[1, 2, 3] = 1
    """3 vanishes first when the table becomes narrow, then 2."""
    help: str = ""

    @property
    def align(self) -> str:
        return "right" if self.kind == "number" else "left"


class FeatureRow(NamedTuple):
    feature: int
    cells: Sequence[Any]


class TableClick(NamedTuple):
    """What was clicked just now: at most one of these is set."""

    open: int | None = None
    pick: int | None = None
    sort: str | None = None


def feature_table(
    columns: Sequence[Column],
    rows: Sequence[FeatureRow],
    *,
    key: str,
    run: str,
    sorted_by: str = "",
    pick: bool = False,
    chosen: int | None = None,
) -> TableClick:
    """Draw ``rows``. A click on a feature's number opens it; on the rest of the row too, unless ``pick`` wants it."""
    data = {
        "columns": [asdict(column) | {"align": column.align} for column in columns],
        "rows": [{"feature": row.feature, "cells": list(row.cells)} for row in rows],
        "run": run,
        "sorted": sorted_by,
        "pick": pick,
        "chosen": chosen,
    }
    sent = _mount(data=data, key=key, on_open_change=_nothing, on_pick_change=_nothing, on_sort_change=_nothing)
    return table_clicked({name: sent.get(name) for name in TableClick._fields}, columns, rows)


def table_clicked(sent: dict[str, Any], columns: Sequence[Column], rows: Sequence[FeatureRow]) -> TableClick:
    """The click that the browser sent, if it names a row or an order of this table; anything else counts as none."""
    features = {row.feature for row in rows}
    orders = {sign + column.sort for column in columns if column.sort for sign in ("", "-")}

    def known(value: Any, allowed: set[Any]) -> Any:
        return value if type(value) in (int, str) and value in allowed else None

    return TableClick(known(sent["open"], features), known(sent["pick"], features), known(sent["sort"], orders))


def _nothing() -> None:
    """Streamlit reports an event only where it has a callback."""
