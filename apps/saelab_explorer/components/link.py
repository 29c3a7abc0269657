"""A button that copies the address of the page: it holds the state of the page, so the link shows the same again."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

_HERE = Path(__file__).parent
_mount = st.components.v2.component(
    "saelab.link",
    html='<button type="button">Copy link to this view</button><span role="status"></span>',
    css=(_HERE / "button.css").read_text("utf-8"),
    js=(_HERE / "link.js").read_text("utf-8"),
)


def copy_link(*, key: str) -> None:
    """Draw the button. The address is read at the click, in the browser."""
    _mount(key=key)
