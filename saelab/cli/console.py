"""What verbs say to a person: a plan before long work, a progress bar during it, a table or JSON after it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saelab.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from saelab.evals.report import Section

Progress = Callable[[int, int, str], None]

# options that many verbs share
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML or JSON file with settings; flags win over it.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. optim.lr=3e-4.")
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the settings as commented TOML, and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default a GPU if there is one.")]


def speaks() -> bool:
    """Whether this process is the one that talks to the user: the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """A line for the person at the keyboard, on standard error, so that standard output stays data."""
    if speaks():
        print(text, file=sys.stderr, flush=True)


def emit(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """The result for machines."""
    if speaks():
        print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), flush=True)


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A bar with rate and remaining time; where no one watches (no terminal), a line every tenth of the way."""
    if not speaks():
        yield lambda done, total, detail: None
        return
    if not sys.stderr.isatty():
        yield _Milestones(title)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, detail="")
        yield lambda done, total, detail: bar.update(task, completed=done, total=total, detail=detail)


class _Milestones:
    def __init__(self, title: str) -> None:
        self._title = title
        self._tenth = 0

    def __call__(self, done: int, total: int, detail: str) -> None:
        tenth = 10 * done // max(total, 1)
        if tenth > self._tenth:
            self._tenth = tenth
            say(f"{self._title}: {done}/{total} {detail}".rstrip())


def written(sections: Iterable[Section]) -> list[str]:
    """The parts of a report for a terminal: titles, tables and sentences; what is a picture only is left out."""
    parts: list[str] = []
    for section in sections:
        if section.tables or section.sentences:
            parts.append(section.title.upper())
            parts += [table(content.rows, header=content.header) for content in section.tables]
            parts += section.sentences
    return parts


def table(rows: Sequence[Sequence[str]], *, header: Sequence[str]) -> str:
    """Columns aligned for reading: numbers to the right, words to the left."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            str(c).rjust(w) if n else str(c).ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)
        ).rstrip()

    return "\n".join([line(header), *map(line, rows)])


def human_bytes(n: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit in ("B", "kB") else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def human_seconds(seconds: int | float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def need_space(directory: Path, n_bytes: int) -> None:
    """Refuse work whose result cannot fit on the disk, before it starts.

    Raises:
        ArtifactError: less free space than needed.
    """
    existing = next(p for p in [directory.absolute(), *directory.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise ArtifactError(
            f"{directory} will need {human_bytes(n_bytes)}, but only {human_bytes(free)} are free; "
            "free some space or ask for fewer --tokens"
        )


def need_memory(n_bytes: int) -> None:
    """Refuse work that cannot fit into this machine's memory, before it starts.

    Raises:
        ConfigError: more than all of it.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_bytes > memory:
        raise ConfigError(
            f"this would need {human_bytes(n_bytes)} of memory, but the machine has {human_bytes(memory)}; "
            "lower --d-sae or --expansion"
        )


def _is_number(text: str) -> bool:
    return (
        str(text)
        .replace(".", "")
        .replace("-", "")
        .replace("+", "")
        .replace("e", "")
        .replace("%", "")
        .replace(",", "")
        .isdigit()
    )
