"""A lens reading as a picture: layers down, tokens across, in each cell the likeliest next token."""

from __future__ import annotations

from pathlib import Path

from saelab.interp.heat_map import Box, Picture, Word, colour_of, svg
from saelab.interp.lens import LensReading
from saelab.interp.picture_page import Page, write_page
from saelab.models.hooks import layer_of

_CELL_WIDTH, _CELL_HEIGHT, _PAD, _LETTER, _LONGEST = 66, 18, 14, 7, 9
_PAPER, _INK = (255, 255, 255), (28, 36, 48)

#: From here on a cell is so dark that its word is written in white.
_DARK = 0.6


def write_reading(reading: LensReading, path: Path) -> None:
    """Write the heat map to ``path`` in the form that its ending names.

    Raises:
        ConfigError: the ending names no picture. ArtifactError: the disk is full or not writable.
    """
    picture, text = picture_of(reading), "".join(reading.tokens[1:])
    write_page(Page("lens", reading.kind, (text,), (svg(picture),), picture, numbers={}, wide=True), path)


def picture_of(reading: LensReading) -> Picture:
    """Darker cells are surer of their token; pointing at one shows its best tokens and its KL to the model."""
    names = [_name(hook) for hook in reading.hook_names]
    heads = [_shortened(token) for token in reading.tokens]
    left, top = _PAD + max(map(len, names)) * _LETTER + 8, _PAD + 30 + max(map(len, heads)) * _LETTER
    boxes, words = [], [Word(_PAD, _PAD + 2, f"{reading.kind}: likeliest next token", size=14, anchor="start")]
    for column, head in enumerate(heads):
        words.append(Word(left + (column + 0.5) * _CELL_WIDTH, top - 6, head, upright=True))
    for row, (hook, name) in enumerate(zip(reading.hook_names, names, strict=True)):
        y = top + row * _CELL_HEIGHT
        words.append(Word(left - 6, y + _CELL_HEIGHT / 2, name, anchor="end"))
        for column in range(len(heads)):
            x, sure = left + column * _CELL_WIDTH, float(reading.top_probs[row, column, 0])
            hint = _hint(reading, hook, row, column)
            boxes.append(Box(x, y, _CELL_WIDTH - 1, _CELL_HEIGHT - 1, colour_of(sure), hint))
            token = _shortened(reading.top_tokens[row][column][0])
            middle = x + (_CELL_WIDTH - 1) / 2
            words.append(Word(middle, y + _CELL_HEIGHT / 2, token, size=10, colour=_PAPER if sure > _DARK else _INK))
    right, bottom = left + len(heads) * _CELL_WIDTH, top + len(names) * _CELL_HEIGHT
    words.append(Word(_PAD, bottom + 16, "white to blue: probability 0 to 1", size=11, anchor="start"))
    return Picture(max(right + _PAD, 320), bottom + 34, f"{reading.kind}, layers by tokens", boxes, words)


def _name(hook: str) -> str:
    """``10`` for what block 10 leaves, ``embed`` for what the first block meets, ``10 mid`` and so on for others."""
    place = hook.rpartition("resid_")[2]
    if place == "pre" and layer_of(hook) == 0:
        return "embed"
    return f"{layer_of(hook)}" if place == "post" else f"{layer_of(hook)} {place}"


def _hint(reading: LensReading, hook: str, row: int, column: int) -> str:
    best = ", ".join(f"{p.token!r} {p.probability:.3f}" for p in reading.top(hook, column))
    return f"{hook}, after {reading.tokens[column]!r}: {best}; KL {float(reading.kl[row, column]):.3g} nats"


def _shortened(token: str) -> str:
    shown = token.replace("\n", "\u21b5").replace("\t", "\u21e5")
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "\u2026"
