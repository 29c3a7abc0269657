"""Documents from wherever text lies: the demo's Wikipedia, local files, or a data set of the Hugging Face hub."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from saelab.errors import ConfigError, TextError, nearest

#: Endings of local files that can be read; the first two also with ``.gz`` after them.
SUFFIXES = (".txt", ".jsonl", ".parquet")

# A text file is cut at blank lines into documents of this size, so that one big file streams and has held-out parts.
_CHARACTERS_PER_DOCUMENT = 50_000


class Document(NamedTuple):
    text: str
    title: str


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Which text."""

    source: str = "demo"
    """"demo" (English Wikipedia), a .txt, .jsonl or .parquet file, a folder of such, or a data set of the hub."""
    column: str = "text"
    """Field of a .jsonl line, column of a .parquet file or of a hub data set, that holds the text."""
    split: str = "train"
    """Split of a hub data set."""
    subset: str | None = None
    """Configuration of a hub data set, for those that have several."""
    max_tokens_per_document: int | None = None
    """Longer documents are cut to this many tokens, so that a small budget still sees many documents."""

    def __post_init__(self) -> None:
        if self.max_tokens_per_document is not None and self.max_tokens_per_document < 1:
            raise ConfigError(
                f"max_tokens_per_document must be at least 1, got {self.max_tokens_per_document}; leave it out for all"
            )


def open_text(spec: TextConfig) -> Iterator[Document]:
    """The documents of ``spec.source`` in a fixed order, one at a time.

    Raises:
        TextError: no such file, folder or data set, a file that is not UTF-8 or does not parse, no such column.
        AssetError: the demo text can be neither found nor fetched.
    """
    if spec.source == "demo":
        from saelab.activations.wikipedia import demo_text

        yield from demo_text()
        return
    path = Path(spec.source).expanduser()
    if path.is_dir():
        yield from _from_folder(path, spec.column)
    elif path.exists():
        yield from _from_file(path, spec.column)
    elif _looks_local(spec.source):
        raise TextError(f"there is no text file or folder {spec.source}; check the path")
    else:
        yield from _from_hub(spec)


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document of this text is kept from training.

    A property of the text alone: the first 8 bytes of its sha256, as a share of 2^64, lie below ``fraction``. Thus a
    document stays on its side whatever else is read, in whatever order, and a larger fraction only adds documents.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or _kind(Path(source)) in SUFFIXES


def _kind(path: Path) -> str:
    """The ending that says how to read a file, without ``.gz``."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _from_folder(folder: Path, column: str) -> Iterator[Document]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _kind(file) in SUFFIXES)
    if not files:
        raise TextError(f"{folder} holds no {', '.join(SUFFIXES)} file; give a folder that does")
    for file in files:
        yield from _from_file(file, column)


def _from_file(file: Path, column: str) -> Iterator[Document]:
    match _kind(file):
        case ".txt":
            yield from _from_plain_text(file)
        case ".jsonl":
            yield from _from_jsonl(file, column)
        case ".parquet":
            yield from _from_parquet(file, column)
        case kind:
            raise TextError(f"{file} ends in {kind or 'nothing'}, not in {', '.join(SUFFIXES)}; convert or rename it")


def _from_plain_text(file: Path) -> Iterator[Document]:
    for part, text in enumerate(_cut_at_blank_lines(_lines(file)), start=1):
        yield Document(text, _title(file.name if part == 1 else f"{file.name}, part {part}"))


def _cut_at_blank_lines(lines: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= _CHARACTERS_PER_DOCUMENT and (not line.strip() or size >= 2 * _CHARACTERS_PER_DOCUMENT):
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def _from_jsonl(file: Path, column: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TextError(f"{file} line {number} is not JSON: {error}; correct the line") from None
        if not isinstance(record, dict):
            raise TextError(f'{file} line {number} is no JSON object; write {{"{column}": "..."}} on each line')
        yield _document(record, column, where=f"{file} line {number}", title=f"{file.name} line {number}")


def _from_parquet(file: Path, column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise TextError(f"{file} has no column {column!r}; {nearest(column, names)}")
            wanted = sorted({column, "title"} & set(names))
            number = 0
            for batch in table.iter_batches(columns=wanted, batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield _document(record, column, where=f"{file} row {number}", title=f"{file.name} row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TextError(f"{file} is not readable as Parquet: {_one_line(error)}; write or fetch it again") from error


def _from_hub(spec: TextConfig) -> Iterator[Document]:
    """Streamed, so that a budget of a million tokens does not download a terabyte."""
    import datasets

    remedy = "check the name, the subset and the split, or give a local file"
    try:
        stream = datasets.load_dataset(spec.source, spec.subset, split=spec.split, streaming=True)
        for number, record in enumerate(stream):
            where = f"{spec.source} row {number}"
            yield _document(record, spec.column, where=where, title=where)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # no network, no such name or split
        raise TextError(f"the data set {spec.source!r} cannot be read: {_one_line(error)}; {remedy}") from error


def _document(record: dict[str, Any], column: str, *, where: str, title: str) -> Document:
    if column not in record:
        raise TextError(f"{where} has no field {column!r}; {nearest(column, record)}")
    text = record[column]
    if not isinstance(text, str):
        raise TextError(f"{where} holds a {type(text).__name__} in {column!r}, not text; choose another column")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TextError(f"{where} holds half a surrogate pair, which is no character; correct or remove it") from None
    named = record.get("title")
    return Document(text, _title(named if isinstance(named, str) and named else title))


def _title(text: str) -> str:
    """One line that can be written as UTF-8; file names can hold other bytes."""
    return " ".join(text.encode(errors="replace").decode().split())


def _lines(file: Path) -> Iterator[str]:
    with _opened(file) as stream:
        try:
            yield from stream
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            raise TextError(f"{file} is not UTF-8 text (it has a byte 0x{byte:02x}); convert it first") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise TextError(f"{file} is damaged: {_one_line(error)}; fetch it again") from error


def _opened(file: Path) -> io.TextIOWrapper:
    try:
        stream: Any = gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # noqa: SIM115 (the wrapper closes it)
    except PermissionError:
        raise TextError(f"no permission to read {file}; change its permissions or choose another file") from None
    # universal newlines: the same document whatever system wrote it; "sig": a byte order mark is no text
    return io.TextIOWrapper(stream, encoding="utf-8-sig")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
