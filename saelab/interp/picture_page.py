"""A result as a file, by the file's ending: a page (HTML), a picture (SVG, PNG), or its numbers (JSON)."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from saelab import atomic
from saelab.errors import ConfigError
from saelab.interp.heat_map import Picture, png

#: Files that can be written; a JSON only of a result that comes with its numbers.
SUFFIXES = (".png", ".svg", ".html", ".json")

_STYLE = (
    ":root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem;"
    " overflow-wrap: anywhere; } svg { max-width: 100%; height: auto; }"
    " .wide { overflow-x: auto; } .wide svg { max-width: none; }"
)


class Page(NamedTuple):
    """A result in every form a file can have."""

    verb: str
    """The verb of the command line that made it, for the title of the window."""
    title: str
    sentences: tuple[str, ...]
    pictures: tuple[str, ...]
    """SVG elements."""
    picture: Picture | None
    """What a PNG is drawn of; None for what is drawn as SVG only."""
    numbers: Mapping[str, Any]
    """Written as JSON beside the picture, unless there are none."""
    wide: bool = False
    """Whether pictures keep their size in the page and scroll, rather than shrink to its width."""


def check_suffix(path: Path, *, numbers: bool = True) -> None:
    """Raise ConfigError unless the ending of ``path`` says what to write; ``numbers``: whether JSON can be."""
    known = SUFFIXES if numbers else SUFFIXES[:-1]
    if path.suffix not in known:
        raise ConfigError(f"{path} ends in {path.suffix or 'nothing'}; end it in {', '.join(known)}")


def write_page(page: Page, path: Path) -> list[Path]:
    """Write ``page`` in the form that the ending says, and beside a picture its numbers as JSON; the files written.

    Raises:
        ConfigError: an unknown ending, or a PNG of what is drawn as SVG only.
        ArtifactError: the disk is full or not writable.
    """
    check_suffix(path, numbers=bool(page.numbers))
    if path.suffix == ".png" and page.picture is None:
        raise ConfigError(f"{path} would be a PNG, but graphs and curves are drawn as .svg or .html; end it in one")
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path]
    if page.numbers:
        beside = path.with_suffix(".json")
        atomic.write_json(beside, page.numbers)
        files = list(dict.fromkeys([path, beside]))
    match path.suffix:
        case ".png" if page.picture is not None:
            atomic.write_bytes(path, png(page.picture))
        case ".svg":
            atomic.write_bytes(path, page.pictures[0].encode())
        case ".html":
            atomic.write_bytes(path, _html(page).encode())
    return files


def _html(page: Page) -> str:
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in page.sentences)
    pictures = "".join(f'<div class="wide">{one}</div>' if page.wide else one for one in page.pictures)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>saelab {page.verb}: {escape(page.title)}'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{escape(page.title)}</h1>{sentences}{pictures}</body></html>\n"
    )
