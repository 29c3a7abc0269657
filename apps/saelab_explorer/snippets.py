"""Small pieces of HTML for ``st.html``. Every text that comes from outside is escaped here, in one place.

Parameters called ``markup`` are HTML already; all others are plain text.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import streamlit as st

from saelab_explorer.figures import signed, visible
from saelab_explorer.labels import Part


def draw(markup: str) -> None:
    """Put markup made by this module on the page."""
    st.html(markup)


def escaped(text: str) -> str:
    """``text`` as text, for callers that build markup of their own."""
    return html.escape(text)


def heading(title: str, *, kicker: str, sub: str = "", chips: Sequence[str] = ()) -> str:
    """The head of a page; ``chips`` are warnings in front of the line under the title."""
    marks = "".join(_tag("span", escaped(chip), "sx-chip") for chip in chips)
    return _head(kicker, _tag("h1", escaped(title), "sx-title"), marks + escaped(sub))


def feature_heading(label: Sequence[Part], *, kicker: str, sub_markup: str, quiet: bool) -> str:
    """The head of a feature's page: its label, with the tokens as chips; ``quiet`` for a label that says nothing."""
    return _head(kicker, _tag("h1", label_markup(label), "sx-title quiet" if quiet else "sx-title"), sub_markup)


def small_heading(label_markup: str, *, kicker: str) -> str:
    """A feature's name where two of them stand side by side."""
    return _tag("div", _tag("div", escaped(kicker), "sx-kicker") + _tag("h3", label_markup, "sx-small"), "sx-head")


def label_markup(label: Sequence[Part]) -> str:
    """A label with its tokens as chips."""
    return " ".join(token(part.text) if part.is_token else escaped(part.text) for part in label)


def token(text: str) -> str:
    """One token as a chip, its white space visible; the text itself stays what it is."""
    return _tag("span", escaped(visible(text)).replace(" ", '<span class="sx-space"> </span>'), "sx-token")


def section(title: str, note: str = "") -> str:
    """A heading inside a page."""
    return section_of(escaped(title), escaped(note))


def section_of(title_markup: str, note_markup: str = "") -> str:
    """A heading inside a page, with tokens or labels in it."""
    return _tag("h2", title_markup + (" " + _tag("span", note_markup) if note_markup else ""), "sx-section")


def note(text: str) -> str:
    return note_of(escaped(text))


def note_of(markup: str) -> str:
    return _tag("div", markup, "sx-note")


class Card(NamedTuple):
    """A number with what it is, its 95 % interval, and where it lies on a scale."""

    name: str
    value: str
    unit: str = ""
    range: str = ""
    """The interval in words."""
    scale: tuple[float, float, float] | None = None
    """(low, value, high) on a scale from 0 to 1; None draws no scale."""
    help: str = ""


def cards(items: Sequence[Card]) -> str:
    """A row of numbers."""
    return _tag("div", "".join(map(_card, items)), "sx-cards")


def _card(card: Card) -> str:
    scale = ""
    if card.scale:
        low, value, high = (100 * min(max(part, 0.0), 1.0) for part in card.scale)
        scale = f'<i></i><b style="left:{low:.2f}%;width:{high - low:.2f}%"></b><u style="left:{value:.2f}%"></u>'
    number = escaped(card.value) + (_tag("small", escaped(card.unit)) if card.unit else "")
    parts = (escaped(card.name), "name"), (number, "number"), (scale, "sx-whisker"), (escaped(card.range), "range")
    return _tag("div", "".join(_tag("div", inner, style) for inner, style in parts), "sx-card", title=card.help)


def facts(items: Mapping[str, str]) -> str:
    """Short numbers in one line."""

    def fact(name: str, value: str) -> str:
        return _tag("div", _tag("div", escaped(name), "name") + _tag("div", escaped(value), "number"), "sx-fact")

    return _tag("div", "".join(fact(*item) for item in items.items()), "sx-facts")


def effects(promoted: Sequence[tuple[str, float]], suppressed: Sequence[tuple[str, float]]) -> str:
    """Tokens that a feature makes more and less likely, with bars on one scale for both sides."""
    largest = max((abs(effect) for _, effect in [*promoted, *suppressed]), default=0.0) or 1.0

    def line(text: str, effect: float) -> str:
        bar = f'<div><div class="bar" style="width:{100 * abs(effect) / largest:.1f}%"></div></div>'
        return _tag("div", token(text) + bar + _tag("div", signed(effect), "number"), "line")

    def side(name: str, style: str, tokens: Sequence[tuple[str, float]]) -> str:
        return _tag("div", _tag("div", name, "name") + "".join(line(*each) for each in tokens), style)

    return _tag("div", side("Promotes", "up", promoted) + side("Suppresses", "down", suppressed), "sx-effects")


def strip(tokens: Sequence[str], acts: Sequence[float], peak: int, max_act: float, *, n_steps: int = 5) -> str:
    """A text coloured by activation, without a script; ``acts[peak]`` is printed in front of it."""

    def one(i: int, text: str, act: float) -> str:
        step = f"sx-step{min(n_steps, 1 + int(n_steps * act / max_act))}" if act > 0 else ""
        style = " ".join(filter(None, (step, "peak" if i == peak else "")))
        return _tag("span", escaped(visible(text)), style, title=f"{act:.3f}" if act > 0 else "")

    value = _tag("span", f"{acts[peak]:.2f}", "value")
    return _tag("div", value + "".join(map(one, range(len(tokens)), tokens, acts)), "sx-strip")


def legend(max_act: float) -> str:
    """The five steps of activation in words."""
    words = f"five steps up to {max_act:.2f}; underlined: the token the text was chosen for"
    return _tag("div", _tag("span", "<i></i>" * 5, "steps") + _tag("span", words), "sx-legend")


def series(names: Sequence[str]) -> str:
    """What the curves of a picture are called, in the order of their colours."""
    marks = "".join(
        _tag("span", _tag("i", "", f"sx-line{n + 1}") + _tag("bdi", escaped(name))) for n, name in enumerate(names)
    )
    return _tag("div", marks, "sx-series")


def answer(
    side: Literal["baseline", "steered"], who: str, prompt: str, text: str, *, remark: str = "", writing: bool = False
) -> str:
    """One continuation, to stand beside another."""
    head = _tag("div", _tag("b", escaped(who)) + _tag("span", escaped(remark)), "who")
    cursor = _tag("span", "", "cursor") if writing else ""
    body = _tag("div", _tag("span", escaped(prompt), "prompt") + escaped(text) + cursor, "text")
    return _tag("div", head + body, f"sx-answer {side}")


def empty(title: str, text: str) -> str:
    """What stands where nothing can be shown."""
    return _tag("div", _tag("b", escaped(title)) + escaped(text), "sx-empty")


def chain(header: Sequence[str], rows: Sequence[Sequence[str]], *, long: int | None = None) -> str:
    """A plain table in which only the column ``long`` may break its lines; it is set in monospace, as commands are."""

    def cell(i: int, text: str) -> str:
        return _tag("td", _tag("code", escaped(text))) if i == long else _tag("td", escaped(text), "short")

    head = "".join(_tag("th", escaped(name)) for name in header)
    body = "".join(_tag("tr", "".join(cell(i, text) for i, text in enumerate(row))) for row in rows)
    return _tag("div", _tag("table", _tag("tr", head) + body, "sx-chain"), "sx-scroll")


def _head(kicker: str, title_markup: str, sub_markup: str) -> str:
    return _tag(
        "div", _tag("div", escaped(kicker), "sx-kicker") + title_markup + _tag("div", sub_markup, "sx-sub"), "sx-head"
    )


def _tag(name: str, inner_markup: str, style: str = "", *, title: str = "") -> str:
    attributes = (f' class="{style}"' if style else "") + (f' title="{escaped(title)}"' if title else "")
    return f"<{name}{attributes}>{inner_markup}</{name}>"
