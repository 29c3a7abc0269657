"""A model reads text; what it computes at some hook points goes to disk. A kill at any moment costs one shard."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int32
from torch import Tensor

from saelab import atomic, rundir
from saelab.activations.claims import Claims
from saelab.activations.ledger import Ledger
from saelab.activations.pairing import LIKE, check_same_vocabulary, check_settings_of_pair
from saelab.activations.quantise import LARGEST, quantised
from saelab.activations.rows import Rows, RowSource, StoreRows, TextRows
from saelab.activations.settings import CacheConfig
from saelab.activations.store import (
    DTYPES,
    SCHEMA,
    STAGE,
    ActivationStore,
    FileEntry,
    Manifest,
    ModelEntry,
    PairEntry,
    ShardEntry,
    map_shard,
    shard_name,
)
from saelab.config import to_mapping
from saelab.errors import ArtifactError, ConfigError, TextError
from saelab.models.load import Model, load_model

__all__ = ["CacheConfig", "capture", "read_activations"]

_log = logging.getLogger(__name__)

#: Called after each forward pass with the tokens done so far, by whomever, and the tokens asked for.
Progress = Callable[[int, int], None]

_POLL_S = 0.05  # how often to look whether the last shards, which others have claimed, are done


def capture(
    config: CacheConfig,
    out: Path,
    *,
    model: Model | None = None,
    like: ActivationStore | None = None,
    resume: bool = False,
    join: bool = False,
    founded: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> ActivationStore:
    """Write the activations that ``config`` asks for to the stage directory ``out``, and open them.

    With ``like`` the model reads the rows of that store instead of text. With ``resume`` an interrupted capture in
    ``out`` continues, a finished one is opened, an empty ``out`` is started. With ``join`` this process helps those
    that are capturing into ``out``, or goes on alone if there are none left; ``founded`` is called as soon as others
    may join. The bytes of manifest, shards and documents.jsonl do not depend on whether, when and how often it was
    interrupted, nor on how many processes took part and which of them were killed.

    Raises:
        ConfigError: an unknown hook, a context longer than the model's, settings that contradict ``like``.
        TextError: no text, or less than one row.
        ArtifactError: ``out`` is taken, was started with other settings, model or text, or is being written by a
            process that was not asked to share it; ``like`` is of another tokenizer; the disk is full.
    """
    begun = (out / "run.json").exists()
    if join and not begun:
        raise ArtifactError(f"there is no capture in {out} to join; start one with: saelab cache --out {out}")
    if not (resume or join):
        rundir.refuse_taken(out)
    elif begun:
        _check_settings(out, config)
        if (out / "DONE").exists():
            return ActivationStore.open(out)
        if LIKE in rundir.parents(out):
            like = ActivationStore.open(rundir.parent(out, LIKE))
    claims = Claims(out)
    try:
        alone = claims.found()
        if join:
            claims.check_shareable()
        if not alone:
            if not join:
                raise claims.refusal()
            claims.share()
        model = model or load_model(config.model)
        hook_names = _hooks_of(model, config)
        if like is not None:
            check_settings_of_pair(config, like)
            check_same_vocabulary(model, like)
            if model.bos_id != like.manifest.bos_id:
                _log.warning(
                    "rows begin with token %d, as in %s, not with the model's own BOS", like.manifest.bos_id, like.path
                )
        source: RowSource = TextRows(config, model) if like is None else StoreRows(like)
        shards = source.shards()
        first = next(shards, None)
        if first is None:
            raise TextError(_nothing_to_read(config, source))

        ledger = Ledger(out, model.weights_sha256)
        if alone:
            stage = _founded(out, config, ledger, like)
            claims.share()
            if founded:
                founded()
        else:
            stage = rundir.StageWriter(out, STAGE)
        crew = _Crew(config, stage, model, hook_names, ledger, claims, progress)
        crew.capture(first, shards)
        with claims.ledger():
            if not (out / "DONE").exists():
                _finish(crew, source, like)
    finally:
        claims.close()
    return ActivationStore.open(out)


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


# --- sharing the work


class _Crew:
    """One process's part in a capture: it makes every shard that is neither done nor claimed when it comes to it."""

    def __init__(
        self,
        config: CacheConfig,
        stage: rundir.StageWriter,
        model: Model,
        hook_names: tuple[str, ...],
        ledger: Ledger,
        claims: Claims,
        progress: Progress | None,
    ) -> None:
        self.config = config
        self.stage = stage
        self.model = model
        self.hook_names = hook_names
        self.ledger = ledger
        self.tally = _Tally()
        self._claims = claims
        self._progress = progress

    def capture(self, first: Rows, rest: Iterator[Rows]) -> None:
        """Return when every shard is done. Each process reads all rows, so that it knows that the others' are right.

        Raises:
            ArtifactError: the text has changed since the capture began, or is another one where another process reads.
        """
        waiting: dict[int, Rows] = {}  # at most one for each process that is at work
        rows: Rows | None = first
        while rows is not None:
            waiting[self.tally.n_shards] = rows
            self.tally.add(rows)
            self._settle(waiting)
            rows = next(rest, None)
        if max(self.ledger.shards, default=0) >= self.tally.n_shards:
            raise ArtifactError(_OTHER_TEXT.format(self.stage.path / shard_name(self.tally.n_shards)))
        while waiting:
            if not self._settle(waiting):
                time.sleep(_POLL_S)

    def _settle(self, waiting: dict[int, Rows]) -> bool:
        """Capture those that no one has claimed, and forget those that are done; whether there was any."""
        n_before = len(waiting)
        for number, rows in list(waiting.items()):
            self.ledger.refresh()
            if number not in self.ledger.shards:
                with self._claims.shard(number) as mine:
                    if not mine:
                        continue
                    self.ledger.refresh()  # it may have been done before it was claimed
                    if number not in self.ledger.shards:
                        self._make(number, rows)
                        del waiting[number]
                        continue
            _check_same_rows(self.stage.path / shard_name(number), rows)
            del waiting[number]
        return len(waiting) < n_before

    def _make(self, number: int, rows: Rows) -> None:
        began = time.monotonic()
        shard = self._write_shard(self.stage.path / shard_name(number), rows)
        speed = round(rows.tokens.size / (time.monotonic() - began), 1)
        n_tokens = number * self.config.rows_per_shard * self.config.context + rows.tokens.size
        with self._claims.ledger():
            self.stage.log({"step": number, "tokens": n_tokens, "tokens_per_second": speed})
            self.ledger.add(number, shard)

    def _write_shard(self, file: Path, rows: Rows) -> ShardEntry:
        from safetensors.torch import save_file

        dtype = DTYPES[self.config.dtype]
        n_before = self.ledger.n_rows * self.config.context
        report = self._progress and _shifted(self._progress, n_before, self.config.tokens)
        acts = read_activations(
            self.model,
            rows.tokens,
            self.hook_names,
            batch_rows=self.config.batch_rows,
            dtype=torch.float32 if dtype in LARGEST else dtype,
            progress=report,
        )
        tensors = {}
        for hook in self.hook_names:
            if dtype in LARGEST:
                tensors[f"acts.{hook}"], tensors[f"scale.{hook}"] = quantised(acts.pop(hook), dtype)
            else:
                tensors[f"acts.{hook}"] = acts.pop(hook)
        tensors |= {"tokens": torch.from_numpy(rows.tokens), "doc": torch.from_numpy(rows.doc)}
        tensors |= {"held_out": torch.from_numpy(rows.held_out).byte()}
        with atomic.replacing(file) as temporary:
            save_file(tensors, temporary)
            digest, n_bytes = atomic.sha256(temporary), temporary.stat().st_size
        return ShardEntry(file=file.name, rows=len(rows.tokens), sha256=digest, bytes=n_bytes)


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


def _shifted(progress: Progress, n_before: int, n_all: int) -> Callable[[int], None]:
    """``progress`` for one shard: adds the tokens of the shards before."""
    return lambda n: progress(n_before + n, n_all)


def _check_same_rows(file: Path, rows: Rows) -> None:
    stored = map_shard(file)
    same = all(np.array_equal(stored[name].numpy(), getattr(rows, name)) for name in Rows._fields)
    if not same:
        raise ArtifactError(_OTHER_TEXT.format(file))


_OTHER_TEXT = "the text no longer gives the tokens that {} holds, it has changed; start anew with another --out"


# --- what must hold before the first shard


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


def _nothing_to_read(config: CacheConfig, source: RowSource) -> str:
    if all(record.sha256 == _EMPTY_SHA256 for record in source.documents):
        return f"the text {config.text.source!r} is empty; give a file or data set with text in it"
    return (
        f"the text {config.text.source!r} has fewer tokens than one row of context={config.context}; "
        "give more text or lower context"
    )


_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


# --- the stage around the shards


def _check_settings(out: Path, config: CacheConfig) -> None:
    before, now = rundir.read_run(out, STAGE)["config"], to_mapping(config)
    for name, value in now.items():
        if before.get(name) != value:
            raise ArtifactError(
                f"{out} was started with {name} = {before.get(name)!r}, not {value!r}; "
                "resume with the old settings, or choose another --out"
            )


def _founded(out: Path, config: CacheConfig, ledger: Ledger, like: ActivationStore | None) -> rundir.StageWriter:
    """The stage in ``out``, begun or looked over: ledger and log hold what can be trusted, leftovers are gone."""
    if (out / "run.json").exists():
        stage = rundir.StageWriter.resume(out, stage=STAGE)
    else:
        parents = {} if like is None else {LIKE: like.path}
        stage = rundir.StageWriter.create(out, stage=STAGE, config=to_mapping(config), parents=parents)
    ledger.recover()
    _sort_metrics(out, ledger)
    return stage


def _sort_metrics(out: Path, ledger: Ledger) -> None:
    """One line for each shard of the ledger, in the order of their numbers: what an undisturbed process would log."""
    if (out / "metrics.jsonl").exists():
        lines = {line["step"]: line for line in rundir.read_metrics(out) if line["step"] in ledger.shards}
        kept = "".join(json.dumps(lines[step]) + "\n" for step in sorted(lines))
        atomic.write_bytes(out / "metrics.jsonl", kept.encode())


def _finish(crew: _Crew, source: RowSource, like: ActivationStore | None) -> None:
    config, model, tally, out = crew.config, crew.model, crew.tally, crew.stage.path
    atomic.sweep(out)  # shards that a killed process had begun
    _sort_metrics(out, crew.ledger)
    documents = out / "documents.jsonl"
    lines = [json.dumps(record._asdict(), ensure_ascii=False) + "\n" for record in source.documents]
    atomic.write_bytes(documents, "".join(lines).encode())
    manifest = Manifest(
        schema=SCHEMA,
        model=ModelEntry(name=config.model, sha256=model.weights_sha256),
        hook_names=crew.hook_names,
        d_model={hook: model.hook_width(hook) for hook in crew.hook_names},
        dtype=config.dtype,
        context=config.context,
        n_rows=tally.n_rows,
        n_held_out_rows=tally.n_held_out_rows,
        n_tokens=tally.n_tokens,
        n_documents=len(source.documents),
        rows_per_shard=config.rows_per_shard,
        held_out_fraction=config.held_out,
        text=config.text,
        bos_id=model.bos_id if like is None else like.manifest.bos_id,
        documents=FileEntry(file=documents.name, sha256=atomic.sha256(documents), bytes=documents.stat().st_size),
        shards=tuple(crew.ledger.shards[number] for number in range(tally.n_shards)),
        like=None if like is None else PairEntry(model=like.manifest.model, sha256=rundir.fingerprint(like.path)),
    )
    atomic.write_json(out / "manifest.json", to_mapping(manifest))
    crew.ledger.discard()
    crew.stage.finish()
    if tally.n_tokens + config.context <= config.tokens:
        _log.warning("the text gave %s tokens, fewer than the %s wanted", f"{tally.n_tokens:,}", f"{config.tokens:,}")
    if config.held_out and not tally.n_held_out_rows:
        _log.warning("no row is held out, so there is nothing to evaluate on; raise held_out or give more documents")
