"""The text of the prompt page. It stays in the session: an address ends up in histories and logs, a text should not."""

from __future__ import annotations

import streamlit as st

KEY = "prompt_text"

#: What the page reads before anything is typed.
FIRST_TEXT = (
    "The lighthouse stood 40 feet above the harbour. In 1923 the French painter came back to Norway, "
    "and wrote in her diary that the sea was never the same colour twice."
)


def text() -> str:
    """The text to read now."""
    return st.session_state.get(KEY, FIRST_TEXT)


def keep(text: str) -> None:
    st.session_state[KEY] = text


def hand_over(text: str) -> None:
    """A callback of another page: read ``text`` on the prompt page. The page itself switches, see ``handed_over``."""
    keep(text)
    st.session_state["prompt_wanted"] = True


def handed_over() -> bool:
    """Whether a callback asked for the prompt page; answers once."""
    return st.session_state.pop("prompt_wanted", False)
