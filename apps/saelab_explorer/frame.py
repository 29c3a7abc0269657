"""What every page shares: which run is open, the ways between pages, and how failures and gaps are told."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
import streamlit as st

import saelab as sl
from saelab import rundir
from saelab.errors import ArtifactError, ConfigError, nearest
from saelab_explorer import address, snippets, theme
from saelab_explorer.components.table import TableClick
from saelab_explorer.launch import ROOT_VARIABLE, RUN_VARIABLE
from saelab_explorer.runs import Run, find_runs

HERE = Path(__file__).parent
OVERVIEW, FEATURES, FEATURE, PROMPT, COMPARE, STEER, PREFERENCE, TRAININGS = (
    f"views/{name}.py"
    for name in ("overview", "features", "feature", "prompt", "compare", "steer", "preference", "runs")
)

# keys of the session: the page's memory where the address bar was emptied by a click on the navigation
_RUN, _FEATURE, _CHOICE = "run", "feature", "run_choice"


def root() -> Path:
    """The directory whose runs are shown."""
    return Path(os.environ.get(ROOT_VARIABLE) or "runs").resolve()


def palette() -> theme.Palette:
    """Colours of charts in the theme that the reader sees now."""
    return theme.PALETTES["dark" if st.context.theme.type == "dark" else "light"]


def choose_run(*, needed: bool = True) -> None:
    """Open the run of the address, else the one open before, else the launcher's; with a selector in the sidebar.

    A page that cannot go on ends here: it needs a run and there is none, or the address names none of them.
    """
    runs = find_runs(root())
    if not runs and not needed:
        st.session_state.pop(_RUN, None)
        return
    if not runs:
        snippets.draw(
            snippets.empty(
                "There is no run here yet", f"{root()} holds no run. Make one with this command, then reload the page."
            )
        )
        st.code(f"saelab demo --out {root() / 'demo'}", language="bash")
        st.stop()
    first = os.environ.get(RUN_VARIABLE) or ("demo" if "demo" in runs else next(iter(runs)))
    name = st.query_params.get("run") or st.session_state.get(_RUN) or first
    if name not in runs:
        other = first if first in runs else next(iter(runs))
        dead_end(
            f"There is no run {name[:60]!r} under {root()}; {nearest(name[:60], runs)}",
            OVERVIEW,
            f"Open the run {other}",
            {"run": other},
        )
    st.session_state[_CHOICE] = name
    with st.sidebar:
        st.selectbox("Run", list(runs), key=_CHOICE, on_change=_run_chosen)
    st.session_state[_RUN] = name


def run() -> Run:
    """The run that is open."""
    return find_runs(root())[st.session_state[_RUN]]


def run_name() -> str | None:
    """The name of the run that is open, for pages that can do without one."""
    return st.session_state.get(_RUN)


def index() -> sl.FeatureIndex:
    """The feature index of the open run. Without one the page ends with the command that makes it."""
    return cached_index(str(require("index", "The feature index is not there yet")))


def require(stage: str, title: str) -> Path:
    """The directory of a finished stage of the open run; without it the page ends with the command that makes it."""
    try:
        return run().stage(stage)
    except ArtifactError as error:
        gap(title, f"{error}.", run().command(stage))


def gap(title: str, why: str, command: str) -> NoReturn:
    """Say what is missing and how to make it, and end the page."""
    snippets.draw(snippets.empty(title, why))
    st.code(command, language="bash")
    st.stop()
    raise AssertionError("st.stop ends the page")


def failure(sentence: str) -> None:
    """Say what went wrong. Names from the address may stand in it, and must not become links, pictures or formulas."""
    st.error(re.sub(r"([\\`*_\[\]<>$~])", r"\\\1", sentence), icon=":material/error:")


def dead_end(sentence: str, page: str, label: str, query: Mapping[str, str]) -> NoReturn:
    """Say what is wrong with the address, offer a way on, and end the page."""
    failure(sentence)
    st.page_link(page, label=label, icon=":material/arrow_forward:", query_params=dict(query))
    st.stop()
    raise AssertionError("st.stop ends the page")


def cached_index(path: str) -> sl.FeatureIndex:
    """The index at ``path``, opened once for all sessions and anew when it was built anew."""
    return _open_index(path, rundir.fingerprint(Path(path)))


@st.cache_resource(show_spinner=False, max_entries=4)
def _open_index(path: str, fingerprint: str) -> sl.FeatureIndex:
    return sl.load_index(path)


def feature_number(n_features: int) -> int | None:
    """The feature of the address, else the one open before; None where none was chosen yet.

    An address that names no feature of this run ends the page with a way on.
    """
    text = st.query_params.get("feature")
    if text is None:
        remembered = st.session_state.get(_FEATURE)
        return remembered if remembered is not None and remembered < n_features else None
    try:
        return address.whole_number(text, below=n_features, what="The feature")
    except ConfigError as error:
        dead_end(str(error), FEATURE, "Open feature 0", address.feature_query(run().name, 0))


def first_feature(index: sl.FeatureIndex) -> int:
    """A feature worth seeing first: of those that are rare, but not too rare, the one its tokens describe best."""
    density, f1 = index.column("density"), np.nan_to_num(index.column("label_f1"))
    rare = (density > 5e-4) & (density < 5e-3) & (index.column("label_kind") == "token")
    return int(np.where(rare, f1, 0).argmax())


def show_address(query: Mapping[str, str | list[str]] | None = None) -> None:
    """Make the address bar name the open run and ``query``, and remember the feature for the next page.

    A list stands there as one entry for each of its items.
    """
    wanted: dict[str, str | list[str]] = {**({"run": name} if (name := run_name()) else {}), **(query or {})}
    feature = wanted.get("feature")
    if isinstance(feature, str):
        st.session_state[_FEATURE] = int(feature)
    listed = {key: value if isinstance(value, list) else [value] for key, value in wanted.items() if value}
    if {key: st.query_params.get_all(key) for key in st.query_params} != listed:
        st.query_params.from_dict(listed)


def change_address(changes: Mapping[str, str | list[str] | None]) -> None:
    """A callback's way to put ``changes`` into the address; None and an empty list take an entry out."""
    kept = {key: st.query_params.get_all(key) for key in st.query_params if key not in changes}
    st.query_params.from_dict({**kept, **{key: value for key, value in changes.items() if value}})


def go_to_feature(feature: int) -> None:
    """A callback: stay on the page and show another feature."""
    st.session_state[_FEATURE] = feature
    st.query_params.from_dict({**st.query_params.to_dict(), **address.feature_query(run().name, feature)})


def open_feature(feature: int, page: str = FEATURE) -> NoReturn:
    """Leave the page for a feature."""
    st.switch_page(page, query_params=address.feature_query(run().name, feature))


def follow(clicked: TableClick) -> None:
    """A click on a row of a table shows its feature on this page, a click on the number opens the feature."""
    if clicked.open is not None:
        open_feature(clicked.open)
    if clicked.pick is not None:
        change_address({"feature": str(clicked.pick)})
        st.rerun()


def _run_chosen() -> None:
    # another run has other features: only the run stays in the address
    st.session_state.pop(_FEATURE, None)
    st.query_params.from_dict({"run": st.session_state[_CHOICE]})
