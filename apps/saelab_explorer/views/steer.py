"""Steer: the same prompt continued with and without a feature, both texts growing at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import streamlit as st

import saelab as sl
from saelab.errors import ArtifactError
from saelab_explorer import frame, live, snippets
from saelab_explorer.address import SteerMode, SteerSettings, feature_query
from saelab_explorer.components.table import Column, FeatureRow, feature_table
from saelab_explorer.figures import percent, signed
from saelab_explorer.labels import label_cell, label_parts, share_cell
from saelab_explorer.runs import read_json

FIRST_PROMPTS: dict[SteerMode, str] = {
    "completion": "The most important thing about",
    "chat": "Tell me about your day in three sentences.",
}
MAX_CHARS = 1000

#: Pairs of texts that the page remembers.
N_KEPT = 20
NAMES: dict[SteerMode, str] = {"completion": "Continue", "chat": "Chat"}


def show() -> None:
    run = frame.run()
    sae_path = frame.require("sae", "There is no trained SAE yet")
    live.started(sae_path)
    index = frame.index()
    feature = frame.feature_number(index.n_features)
    if feature is None:
        feature = frame.first_feature(index)
    settings = SteerSettings.from_query(st.query_params.to_dict())
    frame.show_address({**feature_query(run.name, feature), **settings.query()})
    _head(index, feature)
    _controls(index, feature, settings)
    prompt, asked = _prompt(settings)
    texts = st.container()
    _record(index)  # before the texts, although below them: it should not fade while they are written
    with texts:
        _texts(live.ready(sae_path), feature, settings, prompt, asked=asked)


def _head(index: sl.FeatureIndex, feature: int) -> None:
    share = percent(float(index.column("density")[feature]))
    title, evidence = st.columns([4, 1], vertical_alignment="top")
    with title:
        sub = f"The same prompt with and without this feature, which fires on {share} of tokens"
        parts = label_parts(index, feature)
        snippets.draw(snippets.feature_heading(parts, kicker=f"Steer feature {feature}", sub_markup=sub, quiet=False))
    with evidence, st.container(horizontal=True, horizontal_alignment="right"):
        if st.button("Evidence", key="evidence", shortcut="e"):
            frame.open_feature(feature)


def _controls(index: sl.FeatureIndex, feature: int, settings: SteerSettings) -> None:
    st.session_state["steer_feature"] = feature
    st.session_state["steer_strength"] = settings.strength
    number, strength, length, temperature = st.columns([3, 6, 3, 3], gap="medium", vertical_alignment="top")
    number.number_input("Feature", 0, index.n_features - 1, step=1, key="steer_feature", on_change=_changed)
    strength.slider(
        "Strength",
        -2.0,
        2.0,
        step=0.05,
        key="steer_strength",
        format="%.2f",
        on_change=_changed,
        help="Norm of the added vector as a share of the mean residual norm at the hook; below 0 it is taken away",
    )
    length.slider("New tokens", 8, 120, 40, step=4, key="steer_length", persist_state="session")
    temperature.slider(
        "Temperature",
        0.0,
        1.5,
        0.0,
        step=0.1,
        key="steer_temperature",
        persist_state="session",
        help="0 always takes the likeliest token",
    )


def _changed() -> None:
    now = SteerSettings.from_query(st.query_params.to_dict())
    mode = st.session_state.get("steer_mode") or now.mode
    settings = replace(now, strength=st.session_state["steer_strength"], mode=mode)
    feature = st.session_state["steer_feature"]
    st.query_params.from_dict({**feature_query(frame.run().name, feature), **settings.query()})


def _prompt(settings: SteerSettings) -> tuple[str, bool]:
    """The prompt, and whether the reader asked for texts just now."""
    st.session_state["steer_mode"] = settings.mode
    mode, form = st.columns([3, 12], gap="medium", vertical_alignment="top")
    mode.segmented_control(
        "Mode",
        list(NAMES),
        format_func=NAMES.__getitem__,
        key="steer_mode",
        on_change=_changed,
        required=True,
    )
    with form, st.form("steer", border=False):
        text, button = st.columns([10, 2], gap="small", vertical_alignment="bottom")
        prompt = text.text_input(
            "Prompt" if settings.mode == "completion" else "Message",
            value=FIRST_PROMPTS[settings.mode],
            key=f"steer_prompt_{settings.mode}",
            max_chars=MAX_CHARS,
            persist_state="session",
        )
        asked = button.form_submit_button("Write both", type="primary", width="stretch")
    return prompt or "", asked


class Written(NamedTuple):
    """Two continuations and a remark on each."""

    texts: tuple[str, str]
    remarks: tuple[str, str]
    change: live.NextToken | None
    """What steering did to the token right after the prompt; None while the texts are being written or were stopped."""


def _texts(ready: live.Live, feature: int, settings: SteerSettings, prompt: str, *, asked: bool) -> None:
    slots = [column.empty() for column in st.columns(2, gap="medium")]
    frames = _answers(feature, settings, prompt)
    options = {"max_new_tokens": st.session_state["steer_length"], "temperature": st.session_state["steer_temperature"]}
    # what the texts depend on: while none of it changes they stay on the page
    asking = (frame.run().name, feature, settings, prompt, *options.values())
    written: dict[Any, Written] = st.session_state.setdefault("written", {})
    if asked and prompt.strip():
        stop = st.empty()
        stop.button(
            "Stop", key="stop", icon=":material/stop:"
        )  # any click ends this run of the page, and what is there stays
        for state in _writing(ready, feature, settings, prompt, options, slots):
            written[asking] = state
        stop.empty()
        while len(written) > N_KEPT:
            written.pop(next(iter(written)))
    if asking not in written:
        for slot, draw in zip(slots, frames, strict=True):
            slot.html(draw("", remark="press “Write both”" if prompt.strip() else "type a prompt first"))
        return
    result = written[asking]
    for slot, draw, text, remark in zip(slots, frames, result.texts, result.remarks, strict=True):
        slot.html(draw(text, remark=remark))
    if result.change is None:
        snippets.draw(snippets.note("Stopped."))
        return
    risen = ", ".join(f"{snippets.token(t)} {percent(a)} → {percent(b)}" for t, a, b in result.change.risen)
    kl = f"KL(unsteered ‖ steered) <b>{result.change.kl:.2f} nats</b>"
    snippets.draw(snippets.note_of(f"Right after the prompt: {kl}; likelier than before: {risen}"))


def _answers(feature: int, settings: SteerSettings, prompt: str) -> tuple[partial[str], partial[str]]:
    """How the two texts are drawn. A continued text begins with its prompt; an answer in a chat does not."""
    shown = prompt if settings.mode == "completion" else ""
    name = f"Feature {feature} at {signed(settings.strength)}"
    return (
        partial(snippets.answer, "baseline", "Unsteered", shown),
        partial(snippets.answer, "steered", name, shown),
    )


def _writing(
    ready: live.Live, feature: int, settings: SteerSettings, prompt: str, options: dict[str, Any], slots: list[Any]
) -> Iterator[Written]:
    """Write both texts, showing each piece as it comes; what is written so far after each piece."""
    full = ready.model.chat([{"role": "user", "content": prompt}]) if settings.mode == "chat" else prompt
    frames, texts, remarks = _answers(feature, settings, prompt), ["", ""], ["", ""]
    for piece in live.both_texts(ready, feature, settings.strength, full, **options):
        texts[piece.side] += piece.text
        remarks[piece.side] = f"{piece.n_pieces / max(piece.seconds, 1e-9):.0f} tokens/s"
        yield Written((texts[0], texts[1]), (remarks[0], remarks[1]), None)
        drawn = frames[piece.side](texts[piece.side], remark=remarks[piece.side], writing=not piece.finished)
        slots[piece.side].html(drawn)
    change = live.next_token_change(ready, feature, settings.strength, full)
    yield Written((texts[0], texts[1]), (remarks[0], remarks[1]), change)


RECORD_COLUMNS = (
    Column("Feature", "feature"),
    Column("Label", "label"),
    Column("Strength", "number", help="Share of the mean residual norm at which it costs that KL"),
    Column("Rise", "number", help="Log-probability of its trigger tokens, steered minus unsteered, in nats"),
    Column("Random", "number", priority=2, help="The same for random directions, on average"),
    Column("Advantage", "bar", help="Rise minus random, in nats"),
)


def _record(index: sl.FeatureIndex) -> None:
    """The run's steering record, where there is one: what steering does, measured against random directions."""
    try:
        record = read_json(frame.run().stage("steer") / "steer.json")
    except ArtifactError:
        return
    mean, measured = record["advantage"], [row for row in record["features"] if row["feature"] < index.n_features]
    largest = max((row["advantage"] for row in measured), default=1.0)
    note = f"against {len(record['random_strengths'])} random directions, all at a KL of {record['kl']} nats"
    snippets.draw(snippets.section("Steering record", note))
    rows = [
        FeatureRow(
            row["feature"],
            (
                row["feature"],
                label_cell(index, row["feature"]),
                f"{row['strength']:.2f}",
                signed(row["rise"]),
                signed(row["random_rise"]),
                share_cell(row["advantage"] / max(largest, 1e-9), signed(row["advantage"])),
            ),
        )
        for row in measured
    ]
    clicked = feature_table(RECORD_COLUMNS, rows, key="record", run=frame.run().name)
    interval = f"{signed(mean['value'])} nats (95 %: {signed(mean['low'])} to {signed(mean['high'])})"
    snippets.draw(snippets.note(f"Mean advantage {interval} over {record['n_prompts']} neutral prompts."))
    if clicked.open is not None:
        frame.open_feature(clicked.open)


show()
