"""A matrix of numbers as a picture: rectangles and words once, drawn as SVG for pages and as PNG for slides."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from saelab.errors import ShapeError

_CELL_WIDTH, _CELL_HEIGHT, _PAD, _LETTER = 36, 18, 14, 7
_LONGEST = 18
#: Ends of the scale, told apart by colour-blind eyes as well: blue above 0, red below.
_ABOVE, _BELOW, _PAPER, _INK = (33, 102, 172), (178, 24, 43), (255, 255, 255), (28, 36, 48)
_SHARPNESS = 2


class Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    colour: tuple[int, int, int]
    hint: str = ""


class Word(NamedTuple):
    x: float
    y: float
    """Middle of the line, or where an upright word ends."""
    text: str
    size: int = 12
    anchor: str = "middle"
    """What stands at ``x``: the word's ``start``, ``middle`` or ``end``."""
    colour: tuple[int, int, int] = _INK
    upright: bool = False
    """Written upwards, from ``y``."""


class Picture(NamedTuple):
    width: int
    height: int
    title: str
    boxes: list[Box]
    words: list[Word]


def heat_map(
    values: Float[Tensor, "rows columns"],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    unit: str,
    across: str = "",
    down: str = "",
) -> Picture:
    """Blue above 0, red below, white at 0; the scale ends at the largest absolute value. Cells above a twentieth of it
    have their number written in them, so that the sign is not told by colour alone.

    Raises:
        ShapeError: the labels do not fit the values, there are none, or one is not a finite number.
    """
    if values.shape != (len(rows), len(columns)) or values.numel() == 0 or not values.isfinite().all():
        raise ShapeError(
            f"a heat map needs finite values, one label a row and a column; got values of shape {tuple(values.shape)},"
            f" {len(rows)} and {len(columns)} labels"
        )
    limit = float(values.abs().max()) or 1.0
    names, heads = [_shortened(name) for name in rows], [_shortened(name) for name in columns]
    left = _PAD + 20 + max(map(len, names)) * _LETTER
    top = _PAD + 26 + max(map(len, heads)) * _LETTER
    right, bottom = left + len(columns) * _CELL_WIDTH, top + len(rows) * _CELL_HEIGHT
    boxes, words = [], [Word(_PAD, _PAD + 2, title, size=14, anchor="start")]
    for c, head in enumerate(heads):
        words.append(Word(left + (c + 0.5) * _CELL_WIDTH, top - 6, head, upright=True))
    for r, name in enumerate(names):
        y = top + r * _CELL_HEIGHT
        words.append(Word(left - 6, y + _CELL_HEIGHT / 2, name, anchor="end"))
        for c in range(len(columns)):
            value = float(values[r, c])
            x = left + c * _CELL_WIDTH
            hint = f"{rows[r]}, {columns[c]}: {value:+.4g} {unit}"
            boxes.append(Box(x, y, _CELL_WIDTH - 1, _CELL_HEIGHT - 1, colour_of(value / limit), hint))
            if abs(value) >= limit / 20:
                ink = _PAPER if abs(value) > 0.6 * limit else _INK
                middle = x + (_CELL_WIDTH - 1) / 2
                words.append(Word(middle, y + _CELL_HEIGHT / 2, _number(value), size=9, colour=ink))
    words.append(Word((left + right) / 2, bottom + 14, across))
    words.append(Word(_PAD + 4, (top + bottom) / 2 + len(down) * _LETTER / 2, down, upright=True))
    words += _scale(boxes, left, bottom + 30, limit, unit)
    # a long title or unit may be wider than a narrow grid
    width = max(right, left + 190 + len(unit) * _LETTER, _PAD + len(title) * (_LETTER + 1)) + _PAD
    return Picture(int(width), bottom + 56, title, boxes, [word for word in words if word.text])


def colour_of(share: float) -> tuple[int, int, int]:
    """White at 0, blue at 1, red at -1, and evenly between."""
    end, weight = (_ABOVE if share >= 0 else _BELOW), min(abs(share), 1.0)
    red, green, blue = (round(p + weight * (e - p)) for p, e in zip(_PAPER, end, strict=True))
    return red, green, blue


def svg(picture: Picture) -> str:
    """The picture as an SVG element that needs no script, no font and no network; each cell has its value as a hint."""
    parts = [f'<rect width="{picture.width}" height="{picture.height}" fill="white"/>']
    for box in picture.boxes:
        hint = f"<title>{_visible(box.hint)}</title>" if box.hint else ""
        parts.append(
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
            f' fill="{_css(box.colour)}">{hint}</rect>'
        )
    for word in picture.words:
        turned = f' transform="rotate(-90 {word.x:.1f} {word.y:.1f})"' if word.upright else ""
        anchor = "start" if word.upright else word.anchor
        # the style wins over what a page says of its texts; spaces in tokens are kept
        parts.append(
            f'<text x="{word.x:.1f}" y="{word.y:.1f}" text-anchor="{anchor}" dominant-baseline="central"'
            f' style="font: {word.size}px system-ui, sans-serif; fill: {_css(word.colour)}; white-space: pre;'
            f' unicode-bidi: isolate"{turned}>{_visible(word.text)}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {picture.width} {picture.height}" '
        f'width="{picture.width}" height="{picture.height}" role="img" aria-label="{_visible(picture.title)}">'
        + "".join(parts)
        + "</svg>\n"
    )


def png(picture: Picture) -> bytes:
    """The picture as a PNG file, twice as fine as its size in SVG units."""
    from PIL import Image, ImageDraw, ImageFont

    k = _SHARPNESS
    image = Image.new("RGB", (picture.width * k, picture.height * k), _PAPER)
    draw = ImageDraw.Draw(image)
    for box in picture.boxes:
        corners = (box.x * k, box.y * k, (box.x + box.width) * k - 1, (box.y + box.height) * k - 1)
        draw.rectangle(corners, fill=box.colour)
    for word in picture.words:
        font = ImageFont.load_default(word.size * k)
        if word.upright:
            _write_upright(image, word, font)
        else:
            anchor = {"start": "lm", "middle": "mm", "end": "rm"}[word.anchor]
            draw.text((word.x * k, word.y * k), word.text, fill=word.colour, font=font, anchor=anchor)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _write_upright(image: Any, word: Word, font: Any) -> None:
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(word.text)
    strip = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2), 0)
    ImageDraw.Draw(strip).text((-left + 1, -top + 1), word.text, fill=255, font=font)
    turned = strip.rotate(90, expand=True)
    corner = (int(word.x * _SHARPNESS - turned.width / 2), int(word.y * _SHARPNESS - turned.height))
    image.paste(Image.new("RGB", turned.size, word.colour), corner, turned)


def _scale(boxes: list[Box], x: int, y: int, limit: float, unit: str) -> list[Word]:
    """Draw the colours from one end to the other, and say what the ends are."""
    steps = 21
    for i in range(steps):
        boxes.append(Box(x + i * 6, y, 6, 10, colour_of(2 * i / (steps - 1) - 1)))
    ends = [
        Word(x + i * 6 * steps / 2, y + 18, _number(value), size=10) for i, value in enumerate((-limit, 0.0, limit))
    ]
    return [*ends, Word(x + 6 * steps + 10, y + 5, unit, size=11, anchor="start")]


def _number(value: float) -> str:
    """Three digits at most, as narrow as a cell."""
    text = f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 and value else text


def _shortened(label: str) -> str:
    label = _one_line(label)
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "\u2026"


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _visible(text: str) -> str:
    """Escaped for XML, which cannot hold control characters."""
    return escape(_one_line(text))


def _one_line(text: str) -> str:
    return "".join("\u21b5" if c == "\n" else c if c.isprintable() or c == " " else "\ufffd" for c in text)
