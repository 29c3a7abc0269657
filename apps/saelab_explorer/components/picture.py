"""A button that saves markup as a PNG: the browser draws it, so every script and every emoji that it has is there."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

_HERE = Path(__file__).parent
_mount = st.components.v2.component(
    "saelab.picture",
    html='<button type="button"></button><span role="status"></span>',
    css=(_HERE / "button.css").read_text("utf-8"),
    js=(_HERE / "picture.js").read_text("utf-8"),
)


def save_picture(label: str, *, markup: str, file_name: str, width: int, key: str) -> None:
    """Draw the button. ``markup`` is HTML of our own making, in which foreign texts are escaped."""
    _mount(data={"label": label, "markup": markup, "file": file_name, "width": width}, key=key)
