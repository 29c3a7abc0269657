"""Activations on disk: what lies in the directory, how it is checked, and how it is read.

    manifest.json              what, of which model and text, in which shards; each shard's size and sha256
    shard_00000.safetensors    acts.<hook_name> [rows, seq, d_in], tokens [rows, seq], doc [rows, seq], held_out [rows];
                               of int8 and float8_e4m3fn also scale.<hook_name> [rows, seq], by which to multiply
    documents.jsonl            one line a document: its number in ``doc``, title, side of the split, sha256 of the text

Shards are memory-mapped, so opening a store of any size costs nothing and a batch touches only its own rows.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab import atomic, rundir
from saelab.activations.quantise import LARGEST, dequantised
from saelab.activations.text import TextConfig
from saelab.config import from_mapping
from saelab.errors import ArtifactError, ConfigError, ShapeError, nearest
from saelab.models.hooks import canonical_hook_name

SCHEMA = 1
STAGE = "activations"
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}

DtypeName = Literal["bfloat16", "float32", "float16", "int8", "float8_e4m3fn"]

Split = Literal["train", "held_out", "all"]

# safetensors' own names
_HEADER_NAMES = {"bfloat16": "BF16", "float32": "F32", "float16": "F16", "int8": "I8", "float8_e4m3fn": "F8_E4M3"}
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """Whose activations these are."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """A file of the store, as it must be found."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard, as it must be found."""

    file: str
    rows: int
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PairEntry:
    """The store whose tokens were read again by another model: its model, and the fingerprint of its directory."""

    model: ModelEntry
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of manifest.json."""

    schema: int
    model: ModelEntry
    hook_names: tuple[str, ...]
    d_model: dict[str, int]
    dtype: DtypeName
    context: int
    n_rows: int
    n_held_out_rows: int
    n_tokens: int
    n_documents: int
    rows_per_shard: int
    held_out_fraction: float
    text: TextConfig
    bos_id: int
    documents: FileEntry
    shards: tuple[ShardEntry, ...]
    like: PairEntry | None = None


class DocumentRecord(NamedTuple):
    """One line of documents.jsonl."""

    doc: int
    title: str
    held_out: bool
    sha256: str


class ActivationStore:
    """A finished store, open for reading. Positions are numbered row x context + place in the row."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str, *, verify: Literal["sizes", "full"] = "sizes") -> ActivationStore:
        """The store at ``path``, or the one in the workspace ``path``.

        ``verify="sizes"`` checks that every shard is there, has its size, and holds the tensors it should;
        ``"full"`` also reads everything and compares checksums (about 0.5 s per GB).

        Raises:
            ArtifactError: no such store, unfinished, or damaged; the message names the file.
        """
        path = rundir.find(path, STAGE)
        store = cls(path, read_manifest(path / "manifest.json"))
        _check_size(path / "documents.jsonl", store.manifest.documents.bytes)
        for shard in store.manifest.shards:
            check_shard(path / shard.file, shard, store.manifest)
        if verify == "full":
            store.verify()
        return store

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            ArtifactError: names the first file that differs.
        """
        entries: list[FileEntry | ShardEntry] = [self.manifest.documents, *self.manifest.shards]
        for entry in entries:
            if atomic.sha256(self.path / entry.file) != entry.sha256:
                raise ArtifactError(f"{self.path / entry.file} is damaged (its checksum has changed); capture again")

    def check_model(self, model_sha256: str) -> None:
        """Raise ArtifactError unless these activations come from the model with these weights."""
        model = self.manifest.model
        if model_sha256 != model.sha256:
            raise ArtifactError(
                f"{self.path} holds activations of {model.name} with weights {model.sha256[:12]}, but the model given "
                f"has weights {model_sha256[:12]}; give that model, or capture this one's activations"
            )

    @property
    def hook_names(self) -> tuple[str, ...]:
        return self.manifest.hook_names

    @property
    def n_rows(self) -> int:
        return self.manifest.n_rows

    @property
    def context(self) -> int:
        return self.manifest.context

    @property
    def n_documents(self) -> int:
        return self.manifest.n_documents

    def d_in(self, hook_name: str) -> int:
        """Width of the activations at ``hook_name``."""
        return self.manifest.d_model[self.check_hook(hook_name)]

    def check_hook(self, hook_name: str) -> str:
        """The canonical spelling of ``hook_name``, if the store has it.

        Raises:
            ConfigError: names the nearest one that it has.
        """
        known = canonical_hook_name(hook_name)
        if known not in self.hook_names:
            raise ConfigError(f"{self.path} holds no activations of {hook_name}; {nearest(hook_name, self.hook_names)}")
        return known

    def rows(self, split: Split) -> Int64[np.ndarray, " n"]:
        """Numbers of the rows of a split, ascending."""
        if split == "all":
            return np.arange(self.n_rows)
        return np.flatnonzero(self._held_out == (split == "held_out"))

    def acts(self, hook_name: str, rows: Int64[np.ndarray, " n"]) -> Float[Tensor, "n seq d_in"]:
        """Activations of whole rows: in the store's dtype, or in float32 from int8 and float8_e4m3fn."""
        return self._take_acts(hook_name, rows)

    def tokens(self, rows: Int64[np.ndarray, " n"]) -> Int64[Tensor, "n seq"]:
        """Token ids of whole rows, BOS at position 0."""
        return self._take("tokens", rows).long()

    def docs(self, rows: Int64[np.ndarray, " n"]) -> Int64[Tensor, "n seq"]:
        """The number of the document that each token comes from; a row's BOS counts to the token after it."""
        return self._take("doc", rows).long()

    def gather(self, hook_name: str, positions: Int64[np.ndarray, " n"]) -> Float[Tensor, "n d_in"]:
        """Activations at flat positions (row x context + place), in the dtype of ``acts``."""
        return self._take_acts(hook_name, *np.divmod(positions, self.context))

    @functools.cached_property
    def documents(self) -> tuple[DocumentRecord, ...]:
        """The documents; ``documents[i]`` is the one with number i in ``docs``."""
        lines = (self.path / "documents.jsonl").read_text("utf-8").split("\n")
        return tuple(DocumentRecord(**json.loads(line)) for line in lines if line)

    @functools.cached_property
    def _held_out(self) -> np.ndarray:
        """[n_rows] bool."""
        return torch.cat([self._shard(i)["held_out"] for i in range(len(self.manifest.shards))]).numpy() != 0

    def _take_acts(self, hook_name: str, rows: np.ndarray, places: np.ndarray | None = None) -> Tensor:
        """Activations of whole rows, or at one place of each."""
        hook_name = self.check_hook(hook_name)
        values = self._take(f"acts.{hook_name}", rows, places)
        return (
            dequantised(values, self._take(f"scale.{hook_name}", rows, places)) if values.dtype in LARGEST else values
        )

    def _take(self, name: str, rows: np.ndarray, places: np.ndarray | None = None) -> Tensor:
        """Whole rows of a tensor, or one place of each."""
        # by numpy, whose copies are single-threaded: torch wakes all cores to share a copy that is bound by memory,
        # and waits for every one of them, for 100 ms and more where training keeps them busy
        whole = self._shard(0)[name]
        bits = _bits(whole)
        out = np.empty((len(rows), *bits.shape[1 if places is None else 2 :]), bits.dtype)
        for shard, where, local in self._by_shard(rows):
            bits = _bits(self._shard(shard)[name])
            out[where] = bits[local] if places is None else bits[local, places[where]]
        return torch.from_numpy(out).view(whole.dtype)

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, where its rows stand in ``rows``, their numbers inside the shard)."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.n_rows):
            beyond = rows.min() if rows.min() < 0 else rows.max()
            raise ShapeError(f"{self.path} has rows 0 to {self.n_rows - 1}, but row {beyond} was asked for")
        shards, local_rows = np.divmod(rows, self.manifest.rows_per_shard)
        order = np.argsort(shards, kind="stable")
        for where in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            if len(where):
                yield int(shards[where[0]]), where, local_rows[where]

    def _shard(self, number: int) -> dict[str, Tensor]:
        """The memory-mapped tensors of a shard, mapped at first use."""
        if number not in self._mapped:
            self._mapped[number] = map_shard(self.path / self.manifest.shards[number].file)
        return self._mapped[number]

    @functools.cached_property
    def _mapped(self) -> dict[int, dict[str, Tensor]]:
        return {}


def read_manifest(file: Path) -> Manifest:
    """The manifest in ``file``, checked for its form and for names that would lead out of the store.

    Raises:
        ArtifactError: missing, not readable, of another version, or contradicting itself.
    """
    try:
        plain = json.loads(file.read_text("utf-8"))
        if plain["schema"] != SCHEMA:
            raise ArtifactError(f"{file} has schema {plain['schema']!r}, but this saelab reads {SCHEMA}; capture again")
        manifest = from_mapping(Manifest, plain)
    except FileNotFoundError:
        raise ArtifactError(f"{file} is missing; capture again, or copy the store completely") from None
    except (ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise ArtifactError(f"{file} is damaged or not saelab's ({error}); capture again") from error
    names = [shard.file for shard in manifest.shards]
    if names != [shard_name(i) for i in range(len(names))] or manifest.documents.file != "documents.jsonl":
        raise ArtifactError(f"{file} is damaged: it lists other files than a store has; capture again")
    rows = [shard.rows for shard in manifest.shards]
    full = [manifest.rows_per_shard] * (len(rows) - 1)
    if not rows or rows[:-1] != full or not 0 < rows[-1] <= manifest.rows_per_shard or sum(rows) != manifest.n_rows:
        raise ArtifactError(f"{file} is damaged: its counts of rows do not add up; capture again")
    if set(manifest.hook_names) != set(manifest.d_model):
        raise ArtifactError(f"{file} is damaged: its hook names and widths differ; capture again")
    return manifest


def shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def shard_number(file: str) -> int | None:
    """The number n for which ``file`` is ``shard_name(n)``; None if it is no shard's name."""
    digits = file.removeprefix("shard_").removesuffix(".safetensors")
    return int(digits) if digits.isdecimal() and shard_name(int(digits)) == file else None


def token_bytes(dtype: DtypeName, widths: Iterable[int]) -> int:
    """Bytes that a token takes on the disk: the activations of hooks of these widths, its id and its document."""
    kind = DTYPES[dtype]
    return 8 + sum(width * kind.itemsize + (4 if kind in LARGEST else 0) for width in widths)


def check_shard(file: Path, shard: ShardEntry, manifest: Manifest) -> None:
    """Check a shard's size, and its header against the manifest, without reading its data.

    Raises:
        ArtifactError: missing, truncated, or not what the manifest promises.
    """
    _check_size(file, shard.bytes)
    rows, seq, dtype = shard.rows, manifest.context, _HEADER_NAMES[manifest.dtype]
    expected = {f"acts.{hook}": (dtype, [rows, seq, width]) for hook, width in manifest.d_model.items()}
    if DTYPES[manifest.dtype] in LARGEST:
        expected |= {f"scale.{hook}": ("F32", [rows, seq]) for hook in manifest.d_model}
    expected |= {"tokens": ("I32", [rows, seq]), "doc": ("I32", [rows, seq]), "held_out": ("U8", [rows])}
    if _tensors_in(file) != expected:
        raise ArtifactError(f"{file} is damaged: it lacks the tensors that the manifest promises; capture again")


def map_shard(file: Path) -> dict[str, Tensor]:
    """All tensors of a shard, memory-mapped (copy on write: nobody can change the file through them).

    Raises:
        ArtifactError: not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as shard:
            return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file} is damaged or gone ({error}); capture again") from error


def _bits(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as numpy sees it; numpy has no bfloat16 and no float8."""
    stand_in = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.int8}.get(tensor.dtype, tensor.dtype)
    return tensor.view(stand_in).numpy()


def _check_size(file: Path, n_bytes: int) -> None:
    if not file.exists():
        raise ArtifactError(f"{file} is missing; put it back, or capture again")
    if file.stat().st_size != n_bytes:
        found = file.stat().st_size
        raise ArtifactError(f"{file} has {found:,} bytes instead of {n_bytes:,}, it was cut or changed; capture again")


def _tensors_in(file: Path) -> dict[str, tuple[str, list[int]]] | None:
    """Dtype and shape of each tensor by the header of a safetensors file; None if the header is not whole."""
    with file.open("rb") as stream:
        start = stream.read(8)
        n_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        header = stream.read(n_bytes) if n_bytes <= _MAX_HEADER_BYTES else b""
    try:
        entries: dict[str, Any] = json.loads(header)
        tensors = {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
        end = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        return None
    return tensors if 8 + n_bytes + end == file.stat().st_size else None
