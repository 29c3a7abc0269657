"""A model reads text; what it computes at some hook points goes to disk. A kill at any moment costs one shard."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from saelab import atomic, rundir
from saelab.activations.ledger import Ledger
from saelab.activations.packing import PackedRow, pack
from saelab.activations.store import (
    DTYPES,
    SCHEMA,
    STAGE,
    ActivationStore,
    DocumentRecord,
    FileEntry,
    Manifest,
    ModelEntry,
    ShardEntry,
    map_shard,
    shard_name,
)
from saelab.activations.text import Document, TextConfig, is_held_out, open_text
from saelab.config import to_mapping
from saelab.errors import ArtifactError, ConfigError, TextError
from saelab.models.load import Model, load_model

_log = logging.getLogger(__name__)

#: Called after each forward pass with the tokens done so far and the tokens asked for.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What to capture."""

    model: str = "demo"
    """"demo", a local directory, or a model of the Hugging Face hub."""
    hook_names: tuple[str, ...] = ("blocks.10.hook_resid_post",)
    """Where in the model; the forward pass ends at the last one."""
    text: TextConfig = field(default_factory=TextConfig)
    """Of what text."""
    tokens: int = 1_000_000
    """At most this many tokens, each row's BOS counted."""
    context: int = 128
    """Tokens in a row."""
    held_out: float = 0.05
    """Share of the documents, chosen by a hash of their text, that training never sees and evaluation alone sees."""
    rows_per_shard: int = 256
    """Rows in one file; an interrupted capture repeats at most one file."""
    batch_rows: int = 16
    """Rows in one forward pass."""
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """How activations are stored."""

    def __post_init__(self) -> None:
        if not self.hook_names or len(set(self.hook_names)) != len(self.hook_names):
            raise ConfigError(f"hook_names must name at least one hook, each once, got {list(self.hook_names)}")
        if self.context < 2:
            raise ConfigError(f"context must be at least 2 (BOS and a token), got {self.context}; 128 is usual")
        if self.tokens < self.context:
            raise ConfigError(f"tokens must be at least one row (context={self.context}), got {self.tokens}; raise it")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out must be at least 0 and below 1, got {self.held_out}; 0.05 is usual")
        for name in ("rows_per_shard", "batch_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; leave it out for the default")


class Rows(NamedTuple):
    """Several packed rows as arrays."""

    tokens: Int32[np.ndarray, "rows seq"]
    doc: Int32[np.ndarray, "rows seq"]
    held_out: Bool[np.ndarray, " rows"]


def capture(
    config: CacheConfig,
    out: Path,
    *,
    model: Model | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> ActivationStore:
    """Write the activations that ``config`` asks for to the stage directory ``out``, and open them.

    With ``resume`` an interrupted capture in ``out`` continues, a finished one is opened, an empty ``out`` is started.
    The bytes of manifest, shards and documents.jsonl do not depend on whether, when and how often it was interrupted.

    Raises:
        ConfigError: an unknown hook, a context longer than the model's.
        TextError: no text, or less than one row.
        ArtifactError: ``out`` is taken, was started with other settings, model or text, or the disk is full.
    """
    if not resume:
        rundir.refuse_taken(out)
    elif (out / "run.json").exists():
        _check_settings(out, config)
        if (out / "DONE").exists():
            return ActivationStore.open(out)
    model = model or load_model(config.model)
    hook_names = _hooks_of(model, config)
    read: list[DocumentRecord] = []
    shards = _shards_of(_noted(open_text(config.text), read, config.held_out), model, config)
    first = next(shards, None)
    if first is None:
        raise TextError(_nothing_to_read(config, any_text=any(record.sha256 != _EMPTY_SHA256 for record in read)))

    if resume and (out / "run.json").exists():
        stage = rundir.StageWriter.resume(out, stage=STAGE)
    else:
        stage = rundir.StageWriter.create(out, stage=STAGE, config=to_mapping(config))
    ledger = Ledger(out, model.weights_sha256)
    stage.rewind_metrics(len(ledger.shards) - 1)
    tally = _Tally()
    for number, rows in enumerate(itertools.chain([first], shards)):
        if number < len(ledger.shards):
            _check_same_rows(out / shard_name(number), rows)
        else:
            began = time.monotonic()
            report = _shifted(progress, tally.n_tokens, config.tokens)
            shard = _write_shard(out / shard_name(number), rows, model, hook_names, config, report)
            speed = round(rows.tokens.size / (time.monotonic() - began), 1)
            stage.log({"step": number, "tokens": tally.n_tokens + rows.tokens.size, "tokens_per_second": speed})
            ledger.add(shard)
        tally.add(rows)
    if tally.n_shards < len(ledger.shards):
        raise ArtifactError(_OTHER_TEXT.format(out / shard_name(tally.n_shards)))
    _finish(stage, config, model, hook_names, ledger, tally, read)
    return ActivationStore.open(out)


def rows_of(documents: Iterator[Document], model: Model, config: CacheConfig) -> Iterator[PackedRow]:
    """The rows that ``config`` makes of ``documents`` with the model's tokenizer."""
    return pack(
        documents,
        model.encode,
        context=config.context,
        bos_id=model.bos_id,
        held_out=config.held_out,
        max_tokens=config.tokens,
        max_tokens_per_document=config.text.max_tokens_per_document,
    )


def read_activations(
    model: Model,
    tokens: Int32[np.ndarray, "rows seq"],
    hook_names: Sequence[str],
    *,
    batch_rows: int,
    dtype: torch.dtype,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Float[Tensor, "rows seq d_in"]]:
    """What the model computes at ``hook_names`` for these rows, on the CPU.

    Batches begin at multiples of ``batch_rows``, so that the same rows always meet the same batches.

    Raises:
        ArtifactError: values that ``dtype`` cannot hold.
    """
    out = {hook: torch.empty(*tokens.shape, model.hook_width(hook), dtype=dtype) for hook in hook_names}
    for start in range(0, len(tokens), batch_rows):
        stop = min(start + batch_rows, len(tokens))
        acts = model.capture(torch.from_numpy(tokens[start:stop]).long(), hook_names)
        for hook in hook_names:
            out[hook][start:stop] = acts[hook]
            _check_finite(out[hook][start:stop], hook)
        if progress:
            progress(stop * tokens.shape[1])
    return out


def _check_finite(acts: Float[Tensor, "rows seq d_in"], hook_name: str) -> None:
    if not math.isfinite(acts.sum(dtype=torch.float32)):  # a sum takes a seventh of the time of asking each value
        kind = str(acts.dtype).removeprefix("torch.")
        raise ArtifactError(
            f"the activations at {hook_name} hold values that are no {kind} numbers (NaN, or too large for it); "
            "set dtype to bfloat16 or float32"
        )


# --- text to shards

_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_OTHER_TEXT = "the text no longer gives the tokens that {} holds, it has changed; start anew with another --out"


def _noted(documents: Iterator[Document], read: list[DocumentRecord], held_out: float) -> Iterator[Document]:
    """The documents as they are; what is known of each is added to ``read``."""
    for document in documents:
        digest = hashlib.sha256(document.text.encode()).hexdigest()
        read.append(DocumentRecord(len(read), document.title, is_held_out(document.text, held_out), digest))
        yield document


def _shards_of(documents: Iterator[Document], model: Model, config: CacheConfig) -> Iterator[Rows]:
    rows = rows_of(documents, model, config)
    while chunk := list(itertools.islice(rows, config.rows_per_shard)):
        yield stacked(chunk)


def stacked(rows: Sequence[PackedRow]) -> Rows:
    """Rows as arrays."""
    tokens, doc = (np.stack([row[part] for row in rows]) for part in (0, 1))
    return Rows(tokens, doc, np.array([row.held_out for row in rows]))


def _nothing_to_read(config: CacheConfig, *, any_text: bool) -> str:
    if not any_text:
        return f"the text {config.text.source!r} is empty; give a file or data set with text in it"
    return (
        f"the text {config.text.source!r} has fewer tokens than one row of context={config.context}; "
        "give more text or lower context"
    )


def _hooks_of(model: Model, config: CacheConfig) -> tuple[str, ...]:
    """The hooks' canonical names, after the checks that need the model."""
    if config.context > model.context:
        raise ConfigError(
            f"context={config.context} exceeds the {model.context} tokens that {config.model} can read; lower it"
        )
    hook_names = tuple(model.check_hook(name) for name in config.hook_names)
    if len(set(hook_names)) != len(hook_names):
        raise ConfigError(f"hook_names {list(config.hook_names)} name the same place twice; leave one out")
    return hook_names


@dataclass
class _Tally:
    """What the shards so far amount to."""

    n_shards: int = 0
    n_rows: int = 0
    n_held_out_rows: int = 0
    n_tokens: int = 0

    def add(self, rows: Rows) -> None:
        self.n_shards += 1
        self.n_rows += len(rows.tokens)
        self.n_held_out_rows += int(rows.held_out.sum())
        self.n_tokens += rows.tokens.size


# --- one shard


def _write_shard(
    file: Path,
    rows: Rows,
    model: Model,
    hook_names: Sequence[str],
    config: CacheConfig,
    progress: Callable[[int], None] | None,
) -> ShardEntry:
    from safetensors.torch import save_file

    dtype = DTYPES[config.dtype]
    acts = read_activations(
        model, rows.tokens, hook_names, batch_rows=config.batch_rows, dtype=dtype, progress=progress
    )
    tensors = {f"acts.{hook}": acts[hook] for hook in hook_names}
    tensors |= {"tokens": torch.from_numpy(rows.tokens), "doc": torch.from_numpy(rows.doc)}
    tensors |= {"held_out": torch.from_numpy(rows.held_out).byte()}
    with atomic.replacing(file) as temporary:
        save_file(tensors, temporary)
        digest, n_bytes = atomic.sha256(temporary), temporary.stat().st_size
    return ShardEntry(file=file.name, rows=len(rows.tokens), sha256=digest, bytes=n_bytes)


def _shifted(progress: Progress | None, n_before: int, n_all: int) -> Callable[[int], None] | None:
    """``progress`` for one shard: adds the tokens of the shards before."""
    return None if progress is None else lambda n: progress(n_before + n, n_all)


def _check_same_rows(file: Path, rows: Rows) -> None:
    stored = map_shard(file)
    same = all(np.array_equal(stored[name].numpy(), getattr(rows, name)) for name in Rows._fields)
    if not same:
        raise ArtifactError(_OTHER_TEXT.format(file))


# --- the stage around the shards


def _check_settings(out: Path, config: CacheConfig) -> None:
    before, now = rundir.read_run(out, STAGE)["config"], to_mapping(config)
    for name, value in now.items():
        if before.get(name) != value:
            raise ArtifactError(
                f"{out} was started with {name} = {before.get(name)!r}, not {value!r}; "
                "resume with the old settings, or choose another --out"
            )


def _finish(
    stage: rundir.StageWriter,
    config: CacheConfig,
    model: Model,
    hook_names: Sequence[str],
    ledger: Ledger,
    tally: _Tally,
    read: Sequence[DocumentRecord],
) -> None:
    documents = stage.path / "documents.jsonl"
    lines = [json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in read]
    atomic.write_bytes(documents, "".join(lines).encode())
    manifest = Manifest(
        schema=SCHEMA,
        model=ModelEntry(name=config.model, sha256=model.weights_sha256),
        hook_names=tuple(hook_names),
        d_model={hook: model.hook_width(hook) for hook in hook_names},
        dtype=config.dtype,
        context=config.context,
        n_rows=tally.n_rows,
        n_held_out_rows=tally.n_held_out_rows,
        n_tokens=tally.n_tokens,
        n_documents=len(read),
        rows_per_shard=config.rows_per_shard,
        held_out_fraction=config.held_out,
        text=config.text,
        bos_id=model.bos_id,
        documents=FileEntry(file=documents.name, sha256=atomic.sha256(documents), bytes=documents.stat().st_size),
        shards=tuple(ledger.shards),
    )
    atomic.write_json(stage.path / "manifest.json", to_mapping(manifest))
    ledger.discard()
    stage.finish()
    if tally.n_tokens + config.context <= config.tokens:
        _log.warning("the text gave %s tokens, fewer than the %s wanted", f"{tally.n_tokens:,}", f"{config.tokens:,}")
    if config.held_out and not tally.n_held_out_rows:
        _log.warning("no row is held out, so there is nothing to evaluate on; raise held_out or give more documents")
