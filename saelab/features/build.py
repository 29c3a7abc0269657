"""Build an index: one encode pass over the activations, then every feature from its own pairs, block by block.

The result is the same for any chunking of the encode pass and any size of the blocks: every order is total, and every
sample is chosen by a hash of what it samples.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int
from safetensors.numpy import save_file

from saelab import atomic, rundir
from saelab import config as configs
from saelab.errors import ArtifactError, ShapeError
from saelab.features import codes, examples, index, label, logits, neighbours, statistics
from saelab.features.config import IndexConfig
from saelab.features.records import Label

if TYPE_CHECKING:
    from saelab.activations.store import ActivationStore
    from saelab.models.load import Model
    from saelab.sae.base import SAE

Progress = Callable[[int, int, str], None]


class Corpus(NamedTuple):
    """The indexed rows of the store."""

    rows: Int[np.ndarray, " rows"]
    tokens: Int[np.ndarray, "rows context"]
    docs: Int[np.ndarray, "rows context"]

    @property
    def context(self) -> int:
        return self.tokens.shape[1]

    @property
    def n_tokens(self) -> int:
        """BOS not counted."""
        return self.tokens.size - len(self.rows)

    def store_positions(self) -> Int[np.ndarray, " positions"]:
        """Place in the store of each indexed position."""
        return (self.rows[:, None] * self.context + np.arange(self.context)).reshape(-1)


class Block(NamedTuple):
    """What the pairs of a block of features give; arrays by feature."""

    statistics: statistics.Statistics
    positions: Int[np.ndarray, "features slots"]
    """Top examples, then those of each interval."""
    windows: examples.Windows
    n_clear: Int[np.ndarray, " features"]
    n_clear_held_out: Int[np.ndarray, " features"]
    token_ids: Int[np.ndarray, "features kept"]
    token_fired: Int[np.ndarray, "features kept"]
    rules: tuple[label.Rules, ...]


def build(
    sae: SAE,
    store: ActivationStore,
    model: Model,
    out: Path,
    *,
    settings: IndexConfig,
    sae_path: Path | None,
    progress: Progress | None = None,
    chunk_rows: int = 64,
    block_pairs: int = codes.BLOCK_PAIRS,
) -> None:
    """Write the index of ``sae`` over ``store`` into the empty or absent directory ``out``.

    Needs about 60 bytes of memory for each pair of the largest block, 8 bytes of disk for each pair while it runs, and
    12 bytes of memory for each example's token (features x (n_examples + n_intervals x per_interval) x window).

    Raises:
        ArtifactError: ``out`` is in use, the disk is full, or the store does not hold the SAE's hook or model.
        ShapeError: the SAE reads another width than the store holds.
    """
    hook_name = sae.metadata.hook_name
    _check_fit(sae, store, hook_name)
    parents = {"activations": store.path} | ({"sae": sae_path} if sae_path else {})
    stage = rundir.StageWriter.create(out, stage="index", config=configs.to_mapping(settings), parents=parents)
    corpus = _corpus(store, settings.max_tokens)
    with tempfile.TemporaryDirectory(prefix="codes.part-", dir=out) as folder:
        pairs = codes.encode(sae, store, corpus.rows, Path(folder), hook_name=hook_name, chunk_rows=chunk_rows, progress=progress)
        d_vocab = model.d_vocab
        blocks, n_done = [], 0
        views, split = label.views(corpus.tokens, d_vocab), label.halves(corpus.docs, seed=settings.seed)
        for low, high in codes.blocks(pairs.n_fired, max_pairs=block_pairs):
            blocks.append(_block(codes.by_feature(pairs, low, high), low, corpus, views, split, settings))
            n_done = high
            if progress:
                progress(n_done, len(pairs.n_fired), "features described")
        sample = neighbours.coactivation_sample(pairs, corpus.store_positions(), seed=settings.seed)
        by_coactivation = neighbours.by_coactivation(pairs, sample, n=settings.n_neighbours)
    found: Block = _joined(blocks)
    W_dec, W_U = sae.W_dec.detach(), model.unembed[:, :d_vocab]
    by_cosine = neighbours.by_cosine(W_dec, n=settings.n_neighbours)
    no_table = logits.why_no_table(hook_name, W_dec.shape[1], W_U.shape[0])
    table = (
        logits.empty_table(len(W_dec), settings.n_logits)
        if no_table
        else logits.logit_table(W_dec, W_U, model.final_norm_scale(), n=settings.n_logits)
    )
    vocabulary = model.str_tokens(list(range(d_vocab)))
    promotes = [
        label.listed([vocabulary[t] for t in ids if t >= 0]) if z > table.noise_z else ""
        for ids, z in zip(table.promoted_ids.tolist(), table.z.tolist(), strict=True)
    ]
    labels = label.write_labels(
        list(zip(views, found.rules, strict=True)),
        found.n_clear_held_out,
        found.statistics.n_fired,
        promotes,
        vocabulary,
    )
    top_tokens = _top_tokens(found.positions[:, : settings.n_examples], corpus.tokens, vocabulary)
    store_positions = np.append(corpus.store_positions(), -1)   # an empty slot, -1, stays -1
    docs = np.append(corpus.docs.reshape(-1), -1)[found.positions].astype(np.int32)
    _save(out / "examples.safetensors", {
        "positions": store_positions[found.positions],
        "token_ids": found.windows.token_ids,
        "acts": found.windows.acts,
        "peaks": found.windows.peaks.astype(np.int16),
        "docs": docs,
    })
    _save(out / "logits.safetensors", {name: getattr(table, name) for name in table._fields if name.endswith(("_ids", "_effects"))})
    _save(out / "neighbours.safetensors", {
        f"{by}_{name}": getattr(nearest, name)
        for by, nearest in (("cosine", by_cosine), ("coactivation", by_coactivation))
        for name in nearest._fields
    })
    _save(out / "histograms.safetensors", {"counts": found.statistics.histogram.astype(np.int64)})
    _save(out / "tokens.safetensors", {
        "token_ids": found.token_ids.astype(np.int32),
        "n_fired": found.token_fired.astype(np.int32),
        "n_occurrences": np.bincount(corpus.tokens[:, 1:].reshape(-1), minlength=d_vocab).astype(np.int64),
    })
    with atomic.replacing(out / index.TABLE) as file:
        pq.write_table(_table(found, labels, promotes, table.z, top_tokens, corpus.n_tokens), file)
    _write_text(out / "vocabulary.json", vocabulary)
    _write_text(out / "titles.json", _titles(store, docs))
    manifest = index.IndexManifest(
        schema=index.SCHEMA,
        n_features=len(W_dec),
        n_tokens=corpus.n_tokens,
        n_rows=len(corpus.rows),
        context=corpus.context,
        window=settings.window,
        model_name=store.manifest.model.name,
        model_sha256=store.manifest.model.sha256,
        hook_name=hook_name,
        d_vocab=d_vocab,
        sae_sha256=rundir.fingerprint(sae_path) if sae_path else None,
        activations_sha256=rundir.fingerprint(store.path),
        n_coactivation_tokens=len(sample),
        logits=no_table or logits.DIRECT,
        logit_z_noise=table.noise_z,
        files=tuple(_entry(out / name) for name in (index.TABLE, *index.TENSORS, *index.TEXTS)),
    )
    atomic.write_json(out / "index.json", configs.to_mapping(manifest))
    stage.finish()


def _check_fit(sae: SAE, store: ActivationStore, hook_name: str) -> None:
    if hook_name not in store.hook_names:
        raise ArtifactError(f"the SAE reads {hook_name}, but {store.path} holds {', '.join(store.hook_names)}; give other activations")
    d_in = store.d_in(hook_name)
    if d_in != sae.d_in:
        raise ShapeError(f"the SAE reads vectors of {sae.d_in}, but {hook_name} in {store.path} has {d_in}; give other activations")


def _corpus(store: ActivationStore, max_tokens: int | None) -> Corpus:
    """All rows, or as many as hold ``max_tokens``, spread evenly so that they come from many documents."""
    rows = np.asarray(store.rows("all"))
    n_rows = len(rows) if max_tokens is None else min(len(rows), max(1, max_tokens // store.context))
    rows = rows[np.linspace(0, len(rows) - 1, n_rows).round().astype(int)]
    return Corpus(rows, np.asarray(store.tokens(rows), np.int32), np.asarray(store.docs(rows), np.int32))


def _block(
    pairs: codes.Pairs, low: int, corpus: Corpus, views: tuple[label.View, ...], split: label.Halves, settings: IndexConfig
) -> Block:
    stats = statistics.feature_statistics(pairs, n_bins=settings.n_bins)
    top = examples.top_positions(pairs, context=corpus.context, n=settings.n_examples)
    sampled = examples.interval_positions(
        pairs,
        stats.max,
        n_intervals=settings.n_intervals,
        per_interval=settings.per_interval,
        seed=settings.seed,
        first_feature=low,
        store_positions=corpus.store_positions(),
    )
    positions = np.concatenate([top, sampled.reshape(len(top), -1)], axis=1)
    clear, rules = pairs.above(label.CLEAR * stats.max), []
    for view in views:
        counts = label.count_firings(clear, view, split)
        rules.append(label.best_rules(counts))
        if view.kind == "token":
            token_ids, token_fired = label.specific_items(counts, n=settings.n_tokens_kept)
    return Block(
        statistics=stats,
        positions=positions,
        windows=examples.windows(pairs, positions, corpus.tokens, window=settings.window, after=settings.after),
        n_clear=clear.n_fired,
        n_clear_held_out=counts.fired_held_out,   # the same in every view
        token_ids=token_ids,
        token_fired=token_fired,
        rules=tuple(rules),
    )


def _joined(parts: list[Any]) -> Any:
    """Concatenate the arrays of equally built (nested) tuples."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    joined = [_joined(list(column)) for column in zip(*parts, strict=True)]
    return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)


def _table(
    found: Block,
    labels: list[Label],
    promotes: list[str],
    logit_z: Float[np.ndarray, " features"],
    top_tokens: list[str],
    n_tokens: int,
) -> pa.Table:
    stats = found.statistics
    return pa.table({
        "feature": np.arange(len(labels), dtype=np.int32),
        "density": stats.n_fired / n_tokens,
        "n_fired": stats.n_fired,
        "n_clear": found.n_clear,
        "max": stats.max,
        "mean": stats.mean.astype(np.float32),
        "q50": stats.quantiles[:, 0].astype(np.float32),
        "q90": stats.quantiles[:, 1].astype(np.float32),
        "q99": stats.quantiles[:, 2].astype(np.float32),
        "label": [each.text for each in labels],
        "label_kind": [each.kind for each in labels],
        "label_precision": pa.array([each.precision for each in labels], pa.float64()),
        "label_recall": pa.array([each.recall for each in labels], pa.float64()),
        "label_f1": pa.array([each.f1 for each in labels], pa.float64()),
        "label_n_held_out": pa.array([each.n_held_out for each in labels], pa.int64()),
        "rule_previous": pa.array([[item.previous for item in each.rule] for each in labels], pa.list_(pa.int32())),
        "rule_token": pa.array([[item.token for item in each.rule] for each in labels], pa.list_(pa.int32())),
        "promoted": promotes,
        "logit_z": logit_z,
        "top_token": top_tokens,
    })


def _top_tokens(positions: Int[np.ndarray, "features n"], tokens: Int[np.ndarray, "rows context"], vocabulary: list[str]) -> list[str]:
    """The most frequent token at the peaks of each feature's top examples, the strongest of equals; "" without examples."""
    chosen = np.append(tokens.reshape(-1), -1)[positions]
    n_equal = ((chosen[:, :, None] == chosen[:, None]) & (chosen >= 0)[:, :, None]).sum(2)
    best = np.take_along_axis(chosen, n_equal.argmax(1)[:, None], 1)[:, 0]
    return [vocabulary[t] if t >= 0 else "" for t in best]


def _titles(store: ActivationStore, docs: Int[np.ndarray, "features slots"]) -> dict[str, str]:
    return {str(doc): store.documents[doc].title for doc in np.unique(docs[docs >= 0]).tolist()}


def _save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    with atomic.replacing(path) as file:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)


def _write_text(path: Path, value: Mapping[str, str] | list[str]) -> None:
    """Compact JSON: a vocabulary has tens of thousands of entries."""
    atomic.write_bytes(path, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))


def _entry(path: Path) -> index.FileEntry:
    return index.FileEntry(name=path.name, bytes=path.stat().st_size, sha256=atomic.sha256(path))
