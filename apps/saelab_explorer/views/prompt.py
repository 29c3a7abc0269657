"""Prompt: type a text and see which features fire on it, token by token."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import streamlit as st

import saelab as sl
from saelab_explorer import frame, live, prompt_text, snippets
from saelab_explorer.components.table import Column, FeatureRow, feature_table
from saelab_explorer.components.tokens import TokenClick, TokenRow, token_strip
from saelab_explorer.contrast import Contrast, Side, contrasted
from saelab_explorer.figures import percent, plural
from saelab_explorer.labels import label_cell, label_line, label_parts, share_cell

MAX_TOKENS = 256
MAX_CHARS = 4000

#: Features listed for the text, and for one token.
N_RANKED, N_AT_TOKEN = 30, 12

#: Share of all tokens above which a feature is left out, because it says little about any text.
DENSE = 0.1

Ranking = Literal["max", "sum", "count"]
RANKINGS: dict[Ranking, str] = {"max": "strongest", "sum": "sum", "count": "tokens"}
SIDES: dict[Side, str] = {"first": "more on first", "second": "more on second", "both": "on both"}

Order = TypeVar("Order", Ranking, Side)

#: Texts whose reading is remembered.
N_READINGS = 4


class Reading(NamedTuple):
    """A text that was run, and how long it took."""

    run: str
    text: str
    codes: sl.TextCodes
    ms: float


def show() -> None:
    run = frame.run()
    feature, two = _feature_of_address(), st.query_params.get("two") == "1"
    chosen_feature = {"feature": str(feature)} if feature is not None else {}
    frame.show_address({**chosen_feature, **({"two": "1"} if two else {})})
    sae_path = frame.require("sae", "There is no trained SAE yet")
    live.started(sae_path)  # loads while the reader types
    index = frame.index()
    if feature is not None and feature >= index.n_features:
        sentence = f"There is no feature {feature}; the index holds 0 to {index.n_features - 1}"
        frame.dead_end(sentence, frame.PROMPT, "Read the text without it", {"run": run.name})
    sub = f"Which features fire on a text of your own, at {index.hook_name}"
    snippets.draw(snippets.heading("Prompt", kicker=run.name, sub=sub))
    _form(two=two)
    ready = live.ready(sae_path)
    readings = [_read(ready, text) for text in _texts(two=two)]
    left, right = st.columns([5, 4], gap="large")
    with right:
        contrasts = _contrasted(index, readings[0], readings[1]) if two else None
        ranked = [c.feature for c in contrasts] if contrasts is not None else _ranked(index, readings[0])
    if not ranked and feature is None:
        return
    chosen = feature if feature is not None else ranked[0]
    with left:
        if two:
            _two_coloured_texts(index, readings, chosen)
        else:
            _at_token(index, readings[0], _coloured_text(index, readings[0], chosen))
    with right:
        if contrasts is None:
            _features(index, readings[0], ranked, chosen)
        else:
            _contrast_table(index, contrasts, chosen)


def _texts(*, two: bool) -> list[str]:
    return [prompt_text.text(), prompt_text.second_text()] if two else [prompt_text.text()]


def _feature_of_address() -> int | None:
    text = st.query_params.get("feature", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _form(*, two: bool) -> None:
    st.session_state["typed"], st.session_state["typed_second"] = prompt_text.text(), prompt_text.second_text()
    st.session_state["two_texts"] = two
    st.toggle("Compare with a second text", key="two_texts", on_change=_two_toggled)
    with st.form("prompt", border=False):
        names = {"typed": "First text", "typed_second": "Second text"} if two else {"typed": "Text"}
        for column, (key, name) in zip(st.columns(len(names), gap="medium"), names.items(), strict=True):
            column.text_area(
                name,
                key=key,
                height=90,
                max_chars=MAX_CHARS,
                label_visibility="visible" if two else "collapsed",
                placeholder="Type or paste a text",
            )
        st.form_submit_button("Read features", type="primary", on_click=_submit)


def _two_toggled() -> None:
    frame.change_address({"two": "1" if st.session_state["two_texts"] else None, "feature": None})


def _submit() -> None:
    prompt_text.keep(st.session_state["typed"])
    if "typed_second" in st.session_state and st.query_params.get("two") == "1":
        prompt_text.keep_second(st.session_state["typed_second"])
    st.session_state.pop("token", None)
    frame.change_address({"feature": None})


def _read(ready: live.Live, text: str) -> Reading:
    """Run the model on ``text``, unless it was one of the last texts already."""
    known: dict[tuple[str, str], Reading] = st.session_state.setdefault("readings", {})
    key = (frame.run().name, text)
    if key not in known:
        start = time.perf_counter()
        with st.spinner("Running the model…"):
            codes = sl.encode_text(ready.model, ready.sae, text, max_tokens=MAX_TOKENS)
        known[key] = Reading(*key, codes, 1000 * (time.perf_counter() - start))
        while len(known) > N_READINGS:
            known.pop(next(iter(known)))
    return known[key]


def _ranked(index: sl.FeatureIndex, reading: Reading) -> list[int]:
    """The features of the text, best first, by the order and the filter that stand above the table."""
    snippets.draw(snippets.section("Features in this text"))
    by, max_density = _order_and_filter("Order by", RANKINGS, "max", key="ranking")
    hits = sl.rank_features(reading.codes, index, n=N_RANKED, by=by, max_density=max_density)
    if not hits:
        why = "Only dense features fire on this text; switch off “Hide dense” to see them."
        snippets.draw(snippets.empty("No feature is left", why))
    return [hit.feature for hit in hits]


def _order_and_filter(title: str, names: Mapping[Order, str], first: Order, *, key: str) -> tuple[Order, float | None]:
    """An order of features, and the largest density that the switch beside it lets through."""
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        chosen = st.segmented_control(
            title,
            list(names),
            default=first,
            format_func=names.__getitem__,
            key=key,
            label_visibility="collapsed",
            required=True,
        )
        only_rare = st.toggle(
            "Hide dense", value=True, key="hide_dense", help=f"Those on over {percent(DENSE)} of tokens"
        )
    return chosen or first, DENSE if only_rare else None


def _contrasted(index: sl.FeatureIndex, first: Reading, second: Reading) -> Sequence[Contrast]:
    """The features that set two texts apart, by the order and the filter that stand above the table."""
    snippets.draw(snippets.section("Features of the two texts"))
    side, max_density = _order_and_filter("More on", SIDES, "first", key="side")
    found = contrasted(first.codes, second.codes, index, side=side, n=N_RANKED, max_density=max_density)
    if not found:
        why = "No feature fires more there; choose another order, or switch off “Hide dense”."
        snippets.draw(snippets.empty("No feature is left", why))
    return found


def _two_coloured_texts(index: sl.FeatureIndex, readings: Sequence[Reading], feature: int) -> None:
    """Both texts in one feature's colours, on one scale."""
    label = snippets.label_markup(label_parts(index, feature))
    snippets.draw(snippets.section_of(f"Feature {feature}", label))
    acts = [reading.codes.acts_of(feature) for reading in readings]
    largest = float(index.column("max")[feature])
    for name, reading, own in zip(("First text", "Second text"), readings, acts, strict=True):
        fired = plural(sum(act > 0 for act in own), "token")
        where = f"on {fired} of {len(own)}, at most {max(own):.2f}" if any(own) else f"on none of {len(own)} tokens"
        snippets.draw(snippets.section(name, where))
        peak = max(range(len(own)), key=own.__getitem__) if any(own) else -1
        row = TokenRow(reading.codes.tokens, own, peak, first=1, tips=_tips(index, reading.codes))
        token_strip([row], key=name, max_act=max(largest, *acts[0], *acts[1]), size="large")
    read = " and ".join(f"{reading.ms:.0f} ms" for reading in readings)
    snippets.draw(snippets.note(f"Its maximum in the index is {largest:.2f}. Read in {read}."))


def _contrast_table(index: sl.FeatureIndex, contrasts: Sequence[Contrast], chosen: int) -> None:
    rows = []
    for c in contrasts:
        largest = max(float(index.column("max")[c.feature]), c.first, c.second)
        bars = (share_cell(value / largest, f"{value:.2f}") for value in (c.first, c.second))
        rows.append(FeatureRow(c.feature, (c.feature, label_cell(index, c.feature), *bars)))
    help = "Largest activation on the text; bars are shares of the feature's own maximum"
    columns = (*_NAMES, Column("First", "bar", help=help), Column("Second", "bar", help=help))
    frame.follow(feature_table(columns, rows, key="contrast", run=frame.run().name, pick=True, chosen=chosen))


def _coloured_text(index: sl.FeatureIndex, reading: Reading, feature: int) -> int:
    """Draw the text in one feature's colours; the token whose features are listed: clicked, else the strongest."""
    codes = reading.codes
    acts = codes.acts_of(feature)
    peak = max(range(len(acts)), key=acts.__getitem__)
    label = snippets.label_markup(label_parts(index, feature))
    snippets.draw(snippets.section_of(f"Feature {feature}", label))
    kept = st.session_state.get("token")
    token = kept if isinstance(kept, int) and kept < len(acts) else peak
    row = TokenRow(codes.tokens, acts, peak if any(acts) else -1, first=1, tips=_tips(index, codes))
    largest = float(index.column("max")[feature])
    clicked = token_strip([row], key="text", max_act=max(largest, *acts), size="large", chosen=TokenClick(0, token))
    fired = plural(sum(act > 0 for act in acts), "token")
    note = f"On {fired} of {len(acts)}, at most {max(acts):.2f}; its maximum in the index is {largest:.2f}. "
    snippets.draw(snippets.note(note + f"Read in {reading.ms:.0f} ms."))
    if clicked is None:
        return token
    st.session_state["token"] = clicked.i
    return clicked.i


def _tips(index: sl.FeatureIndex, codes: sl.TextCodes) -> list[str]:
    """For the tooltip of each token: its strongest feature that is not dense."""
    density = index.column("density")

    def tip(i: int) -> str:
        best = next(((feature, act) for feature, act in codes.at(i) if density[feature] <= DENSE), None)
        return f"{best[0]}  {best[1]:.2f}  {label_line(index, best[0])[:60]}" if best else "dense features only"

    return [tip(i) for i in range(len(codes.tokens))]


def _at_token(index: sl.FeatureIndex, reading: Reading, token: int) -> None:
    active = reading.codes.at(token)
    title = snippets.token(reading.codes.tokens[token])
    snippets.draw(snippets.section_of(title, f"{plural(len(active), 'feature')} on this token"))
    strongest = max((act for _, act in active), default=1.0)
    rows = [_row(index, feature, share_cell(act / strongest, f"{act:.2f}")) for feature, act in active[:N_AT_TOKEN]]
    bar = Column("Activation", "bar", help="On this token; bars compare with the strongest feature here")
    frame.follow(feature_table((*_NAMES, bar, _DENSITY), rows, key="at_token", run=frame.run().name, pick=True))


def _features(index: sl.FeatureIndex, reading: Reading, ranked: list[int], chosen: int) -> None:
    most = {feature: max(reading.codes.acts_of(feature)) for feature in ranked}
    rows = [
        _row(index, f, share_cell(most[f] / max(float(index.column("max")[f]), most[f]), f"{most[f]:.2f}"))
        for f in ranked
    ]
    bar = Column("Activation", "bar", help="Largest on this text; bars are shares of each feature's own maximum")
    columns = (*_NAMES, bar, _DENSITY)
    frame.follow(feature_table(columns, rows, key="in_text", run=frame.run().name, pick=True, chosen=chosen))


_NAMES = (Column("Feature", "feature"), Column("Label", "label"))
_DENSITY = Column("Density", "number", priority=3, help="Share of all indexed tokens on which it fires")


def _row(index: sl.FeatureIndex, feature: int, bar: object) -> FeatureRow:
    density = percent(float(index.column("density")[feature]))
    return FeatureRow(feature, (feature, label_cell(index, feature), bar, density))


show()
