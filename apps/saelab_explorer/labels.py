"""How features are named in tables and headings, the same on every page."""

from __future__ import annotations

from typing import Any, NamedTuple

import saelab as sl
from saelab_explorer.figures import percent, visible


class Part(NamedTuple):
    """A piece of a label: a word of ours, or a token, which is drawn as a chip."""

    text: str
    is_token: bool


#: Tokens and pairs named in a label; dots stand for the rest of its rule.
N_NAMED = 4


def label_parts(index: sl.FeatureIndex, feature: int) -> list[Part]:
    """The label of a feature, its tokens apart from its words; spellings that differ by case or space stand once."""
    label, vocabulary = index.label(feature), index.vocabulary
    if label.kind == "promotes":
        named: list[tuple[str, ...]] = [(effect.token,) for effect in index.feature(feature).promoted]
    else:
        named = [tuple(vocabulary[token] for token in item if token is not None) for item in label.rule]
    distinct: dict[tuple[str, ...], tuple[str, ...]] = {}
    for texts in named:
        distinct.setdefault(tuple(text.strip().casefold() or text for text in texts), texts)
    if not distinct:
        return [Part(visible(label.text) or "no label", False)]
    word = "promotes" if label.kind == "promotes" else "after" if label.rule[0].token is None else ""
    parts = [Part(word, False)] if word else []
    for n, texts in enumerate(list(distinct.values())[:N_NAMED]):
        if len(texts) == 2:
            parts += [Part(",", False)] * (n > 0) + [Part(visible(texts[0]), True), Part("→", False)]
        parts.append(Part(visible(texts[-1]), True))
    return parts + ([Part("…", False)] if len(distinct) > N_NAMED else [])


def label_line(index: sl.FeatureIndex, feature: int) -> str:
    """The label on one line of plain text."""
    return visible(index.label(feature).text) or "no label"


def label_cell(index: sl.FeatureIndex, feature: int) -> list[list[Any]]:
    """The label for a table's cell."""
    return [list(part) for part in label_parts(index, feature)]


def share_cell(share: float | None, text: str | None = None) -> dict[str, Any] | None:
    """A share from 0 to 1 as a number with a bar, or an empty cell."""
    return None if share is None else {"share": share, "text": text or percent(share)}
