"""The token strip: texts whose tokens are coloured by a feature's activation, with tooltips, clicks and arrow keys.

One mount draws all rows of a section: a mount per row would resend the script each time and is five times slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import streamlit as st

_HERE = Path(__file__).parent
_mount = st.components.v2.component(
    "saelab.tokens",
    html='<div class="strip"></div>',
    css=(_HERE / "tokens.css").read_text("utf-8"),
    js=(_HERE / "tokens.js").read_text("utf-8"),
)


@dataclass(frozen=True)
class TokenRow:
    """One text of the strip; ``acts[i]`` belongs to ``tokens[i]`` and colours it."""

    tokens: Sequence[str]
    acts: Sequence[float]
    peak: int = -1
    """Index of the underlined token; -1 for none."""
    first: int = 0
    """Position of the first token in its own text, for the tooltip."""
    value: str | None = None
    """Printed in front of the row."""
    note: str = ""
    """Printed behind it."""
    tips: Sequence[str] | None = None
    """A further line of each token's tooltip."""


class TokenClick(NamedTuple):
    row: int
    i: int


def token_strip(
    rows: Sequence[TokenRow],
    *,
    key: str,
    max_act: float,
    breaks: bool = False,
    size: Literal["normal", "large"] = "normal",
    chosen: TokenClick | None = None,
) -> TokenClick | None:
    """Draw ``rows`` in five steps of ``max_act``. Returns the token clicked just now, in one run of the page only."""
    data = {"rows": [asdict(row) for row in rows], "max": max_act, "breaks": breaks, "size": size, "chosen": chosen}
    return token_clicked(_mount(data=data, key=key, on_token_change=lambda: None).token, rows)


def token_clicked(sent: object, rows: Sequence[TokenRow]) -> TokenClick | None:
    """The click that the browser sent, if it points into ``rows``; a stale or forged one counts as none."""
    if not isinstance(sent, dict):
        return None
    row, i = sent.get("row"), sent.get("i")
    if type(row) is not int or type(i) is not int or not 0 <= row < len(rows) or not 0 <= i < len(rows[row].tokens):
        return None
    return TokenClick(row, i)
