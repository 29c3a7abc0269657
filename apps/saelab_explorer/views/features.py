"""Features: the whole dictionary as a table, searched, filtered and sorted; the filters stand in the address."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import streamlit as st

import saelab as sl
from saelab.errors import TextError
from saelab_explorer import frame, snippets
from saelab_explorer.address import DECADES, KINDS, Filters
from saelab_explorer.components.table import Column, FeatureRow, feature_table
from saelab_explorer.figures import count, percent, plural, visible
from saelab_explorer.labels import label_cell, share_cell
from saelab_explorer.matching import Matches, matching

PER_PAGE = 50

KIND_NAMES: Mapping[str, str] = {
    "token": "token",
    "previous": "after a token",
    "bigram": "pair of tokens",
    "promotes": "promotes",
    "weak": "weak rule",
    "none": "no clear rule",
    "dead": "silent",
}

_PRECISION = "Share of the rule's held-out matches on which the feature clearly fires: reaches a quarter of its maximum"
_RECALL = "Share of the held-out clear firings that the rule matches"
COLUMNS = (
    Column("Feature", "feature", sort="feature"),
    Column("Label", "label", sort="f1", help="Sorts by F1 of the label's rule on held-out text"),
    Column("Precision", "bar", sort="precision", priority=2, help=_PRECISION),
    Column("Recall", "bar", sort="recall", priority=3, help=_RECALL),
    Column("Density", "number", sort="density", help="Share of tokens on which the feature fires"),
    Column("Max", "number", sort="max", priority=2, help="Largest activation in the indexed text"),
    Column("Activations", "spark", priority=3, help="Histogram from 0 to its maximum; heights are logarithmic"),
)
PROMOTES = Column("Promotes", "tokens", priority=3, help="Tokens it makes more likely, where they stand out")


def show() -> None:
    index = frame.index()
    filters = Filters.from_query(st.query_params.to_dict())
    frame.show_address(filters.query())
    sub = f"{count(index.n_features)} features at {index.hook_name}, over {count(index.n_tokens)} tokens of text"
    snippets.draw(snippets.heading("Features", kicker=frame.run().name, sub=sub))
    _widgets(filters)
    try:
        found = matching(index, filters)
    except TextError as error:
        snippets.draw(snippets.empty("Nothing found", str(error)))
        return
    if len(found.features):
        _table(index, filters, found)
        return
    why = "Widen the range of densities, allow more kinds of label, or search for another word."
    snippets.draw(snippets.empty("No feature matches", why))
    st.button("Clear all filters", on_click=_apply, args=(Filters(),))


def _table(index: sl.FeatureIndex, filters: Filters, found: Matches) -> None:
    last_page = (len(found.features) - 1) // PER_PAGE
    page = min(filters.page, last_page)
    shown = found.features[page * PER_PAGE : (page + 1) * PER_PAGE].tolist()
    first, last = page * PER_PAGE + 1, page * PER_PAGE + len(shown)
    snippets.draw(snippets.note(f"{plural(len(found.features), 'feature')}{found.note} · showing {first} to {last}"))
    # where the hook is far from the unembedding no feature promotes anything clearly, and the column would be empty
    records = [index.feature(feature) for feature in shown]
    columns = (*COLUMNS, PROMOTES) if any(record.stands_out for record in records) else COLUMNS
    rows = [FeatureRow(record.index, _cells(index, record)[: len(columns)]) for record in records]
    clicked = feature_table(columns, rows, key="features", run=frame.run().name, sorted_by=filters.sort)
    if clicked.open is not None:
        frame.open_feature(clicked.open)
    if clicked.sort is not None:
        _apply(replace(filters, sort=clicked.sort).first_page())
        st.rerun()
    if last_page:
        _pager(filters, page, last_page)


def _cells(index: sl.FeatureIndex, record: sl.FeatureRecord) -> tuple[Any, ...]:
    return (
        record.index,
        label_cell(index, record.index),
        share_cell(record.label.precision),
        share_cell(record.label.recall),
        percent(record.density),
        f"{record.max_act:.2f}",
        _coarse(record.histogram.counts) if record.alive else None,
        [visible(effect.token) for effect in record.promoted[:3]] if record.stands_out else None,
    )


def _coarse(counts: tuple[int, ...], n_bins: int = 25) -> list[int]:
    """A histogram with fewer bins, for a picture of 100 pixels."""
    return [int(part.sum()) for part in np.array_split(np.asarray(counts), min(n_bins, len(counts)))]


def _widgets(filters: Filters) -> None:
    # the address is the truth; widgets show it, and write to it when they change
    st.session_state["filter_q"] = filters.q
    st.session_state["filter_kinds"] = list(filters.kinds)
    search, kinds, density = st.columns([5, 4, 3], gap="medium", vertical_alignment="top")
    search.text_input(
        "Search",
        key="filter_q",
        placeholder='words, a "token" in quotes, or a number',
        icon=":material/search:",
        type="search",
        max_chars=200,
        on_change=_read_widgets,
    )
    kinds.multiselect(
        "Kind of label",
        KINDS,
        key="filter_kinds",
        format_func=KIND_NAMES.__getitem__,
        placeholder="all kinds",
        on_change=_read_widgets,
    )
    # this widget takes a range only as its first value, so that it is made anew, under another name, for another range
    density.select_slider(
        "Density",
        DECADES,
        value=(filters.low, filters.high),
        key=_density_key(filters),
        format_func=_stop,
        on_change=_read_widgets,
    )


def _density_key(filters: Filters) -> str:
    return f"filter_density_{filters.low}_{filters.high}"


def _stop(decade: float) -> str:
    return "0 %" if decade == DECADES[0] else percent(10**decade)


def _read_widgets() -> None:
    now = Filters.from_query(st.query_params.to_dict())
    low, high = st.session_state[_density_key(now)]
    kinds = tuple(kind for kind in KINDS if kind in st.session_state["filter_kinds"])
    _apply(replace(now, q=st.session_state["filter_q"] or "", kinds=kinds, low=low, high=high).first_page())


def _apply(filters: Filters) -> None:
    st.query_params.from_dict({"run": frame.run().name, **filters.query()})


def _pager(filters: Filters, page: int, last_page: int) -> None:
    with st.container(horizontal=True, horizontal_alignment="center", vertical_alignment="center"):
        back, on = (replace(filters, page=page + by) for by in (-1, 1))
        st.button("Previous", key="page_back", on_click=_apply, args=(back,), disabled=page == 0, shortcut="Left")
        st.button("Next", key="page_on", on_click=_apply, args=(on,), disabled=page == last_page, shortcut="Right")
        st.caption(f"page {page + 1} of {last_page + 1}", width="content")


show()
