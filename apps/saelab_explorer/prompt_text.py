"""The text of the prompt page. It stays in the session: an address ends up in histories and logs, a text should not."""

from __future__ import annotations

import streamlit as st

KEY, SECOND_KEY = "prompt_text", "prompt_text_second"

#: What the page reads before anything is typed.
FIRST_TEXT = (
    "The lighthouse stood 40 feet above the harbour. In 1923 the French painter came back to Norway, "
    "and wrote in her diary that the sea was never the same colour twice."
)

#: What it is compared with, until something else is typed: the same words without the numbers and the places.
FIRST_SECOND_TEXT = (
    "The lighthouse stood far above the harbour. Once the old painter came back to her village, "
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


def second_text() -> str:
    """The text that is compared with it."""
    return st.session_state.get(SECOND_KEY, FIRST_SECOND_TEXT)


def keep_second(text: str) -> None:
    st.session_state[SECOND_KEY] = text
