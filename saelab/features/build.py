"""Build an index: one pass over the activations, then every feature from its own pairs, block by block.

The result is the same for any chunking of the pass, any size of the blocks and however often the pass was killed and
resumed: every order is total, every sample is chosen by a hash of what it samples, and what is added up are integers.
"""

from __future__ import annotations

import json
import shutil
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
from saelab.features.scan import CHECKPOINTS, CODES, FoundFeatures, scan

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

    def places(self, store_positions: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
        """The indexed position of each place in the store; -1 stays."""
        row = np.searchsorted(self.rows, store_positions // self.context)
        return np.where(store_positions < 0, -1, row * self.context + store_positions % self.context)


class Described(NamedTuple):
    """What the pairs of a block of features give; arrays by feature."""

    quantiles: Float[np.ndarray, "features 3"]
    windows: examples.Windows
    n_clear: Int[np.ndarray, " features"]
    n_clear_held_out: Int[np.ndarray, " features"]
    tokens: label.Specific
    rules: tuple[label.Rules, ...]


class Chosen(NamedTuple):
    """The examples of each feature."""

    positions: Int[np.ndarray, "features slots"]
    """In the store: top examples, then those of each interval; -1 where a slot is empty."""
    interval_edges: Float[np.ndarray, "features intervals_plus_1"]


class Related(NamedTuple):
    """What the decoder's directions give, and co-activation."""

    by_cosine: neighbours.Nearest
    by_coactivation: neighbours.Nearest
    n_coactivation_tokens: int
    effects: logits.LogitTable
    how: str
    """How the effects were computed, or why there are none."""


class Written(NamedTuple):
    """The words: what the table says of every feature."""

    labels: list[Label]
    promotes: list[str]
    top_tokens: list[str]


def build(
    sae: SAE,
    store: ActivationStore,
    model: Model,
    out: Path,
    *,
    settings: IndexConfig,
    sae_path: Path | None,
    resume: bool = False,
    progress: Progress | None = None,
    chunk_rows: int = 64,
    checkpoint_chunks: int = 32,
    block_pairs: int = codes.BLOCK_PAIRS,
) -> None:
    """Write the index of ``sae`` over ``store`` into the empty or absent directory ``out``.

    With ``resume`` a build in ``out`` that was interrupted goes on from its last checkpoint, a finished one stays.

    Memory: about 100 bytes for each pair of the largest block, 24 for each indexed token, 8 for each token of an
    example's window (features x (n_examples + n_intervals x per_interval) x window), and the state of the pass
    (``scan.memory_bytes``). Disk, while it runs: 8 bytes for each pair.

    Raises:
        ArtifactError: ``out`` is in use, the disk is full, the store does not hold the SAE's hook, or what is resumed
            was begun with other settings or other inputs.
        ShapeError: the SAE reads another width than the store holds.
    """
    hook_name = sae.metadata.hook_name
    _check_fit(sae, store, hook_name)
    if resume and (out / "DONE").exists():
        return
    stage = _stage(out, settings, store, sae_path, resume=resume)
    corpus = corpus_of(store, settings.max_tokens)
    views, split = label.views(corpus.tokens, model.d_vocab), label.halves(corpus.docs, seed=settings.seed)
    pairs, found = scan(
        sae,
        store,
        corpus.rows,
        out,
        hook_name=hook_name,
        settings=settings,
        chunk_rows=chunk_rows,
        checkpoint_chunks=checkpoint_chunks,
        progress=progress,
    )
    chosen = _choose(found, settings)
    blocks = []
    for low, high in codes.blocks(found.n_fired, max_pairs=block_pairs):
        places = corpus.places(chosen.positions[low:high])
        blocks.append(
            _describe(codes.by_feature(pairs, low, high), found.max[low:high], places, corpus, views, split, settings)
        )
        if progress:
            progress(high, len(found.n_fired), "features described")
    described: Described = _joined(blocks)
    related = _relate(sae, model, pairs, corpus, settings, progress)
    vocabulary = model.str_tokens(list(range(model.d_vocab)))
    written = _write_words(found, described, related, views, corpus, vocabulary, settings)
    _save_all(out, found, chosen, described, related, written, corpus, store, vocabulary, settings)
    manifest = index.IndexManifest(
        schema=index.SCHEMA,
        n_features=len(written.labels),
        n_tokens=corpus.n_tokens,
        n_rows=len(corpus.rows),
        context=corpus.context,
        window=settings.window,
        model_name=store.manifest.model.name,
        model_sha256=store.manifest.model.sha256,
        hook_name=hook_name,
        d_vocab=len(vocabulary),
        sae_sha256=rundir.fingerprint(sae_path) if sae_path else None,
        activations_sha256=rundir.fingerprint(store.path),
        n_coactivation_tokens=related.n_coactivation_tokens,
        logits=related.how,
        logit_z_noise=related.effects.noise_z,
        files=tuple(_entry(out / name) for name in (index.TABLE, *index.TENSORS, *index.TEXTS)),
    )
    atomic.write_json(out / "index.json", configs.to_mapping(manifest))
    for name in (CODES, CHECKPOINTS):
        shutil.rmtree(out / name)
    stage.finish()


def _stage(
    out: Path, settings: IndexConfig, store: ActivationStore, sae_path: Path | None, *, resume: bool
) -> rundir.StageWriter:
    """The directory to build in, new or, with ``resume``, one that was begun alike."""
    plain = configs.to_mapping(settings)
    if resume and (out / "run.json").exists():
        if rundir.read_run(out, "index")["config"] != plain:
            raise ArtifactError(
                f"{out} was started with other settings; resume with those in its run.json, or choose another --out"
            )
        return rundir.StageWriter.resume(out, stage="index")
    parents = {"activations": store.path} | ({"sae": sae_path} if sae_path else {})
    return rundir.StageWriter.create(out, stage="index", config=plain, parents=parents)


def _check_fit(sae: SAE, store: ActivationStore, hook_name: str) -> None:
    if hook_name not in store.hook_names:
        held = ", ".join(store.hook_names)
        raise ArtifactError(f"the SAE reads {hook_name}, but {store.path} holds {held}; give other activations")
    d_in = store.d_in(hook_name)
    if d_in != sae.d_in:
        raise ShapeError(
            f"the SAE reads vectors of {sae.d_in}, but {hook_name} in {store.path} has {d_in}; give other activations"
        )


def corpus_of(store: ActivationStore, max_tokens: int | None) -> Corpus:
    """All rows, or as many as hold ``max_tokens``, spread evenly so that they come from many documents."""
    rows = np.asarray(store.rows("all"))
    n_rows = len(rows) if max_tokens is None else min(len(rows), max(1, max_tokens // store.context))
    rows = rows[np.linspace(0, len(rows) - 1, n_rows).round().astype(int)]
    return Corpus(rows, np.asarray(store.tokens(rows), np.int32), np.asarray(store.docs(rows), np.int32))


def _choose(found: FoundFeatures, settings: IndexConfig) -> Chosen:
    sampled = examples.interval_examples(found.sample, found.max, n_intervals=settings.n_intervals)
    slots = sampled.positions.reshape(len(found.max), -1)
    return Chosen(np.concatenate([found.top_positions, slots], axis=1), sampled.edges)


def _describe(
    pairs: codes.Pairs,
    maxima: Float[np.ndarray, " features"],
    places: Int[np.ndarray, "features slots"],
    corpus: Corpus,
    views: tuple[label.View, ...],
    split: label.Halves,
    settings: IndexConfig,
) -> Described:
    """The features of a block, with ``places`` the indexed positions of their examples."""
    clear, rules = pairs.above(label.CLEAR * maxima), []
    for view in views:
        counts = label.count_firings(pairs, clear, view, split)
        rules.append(label.best_rules(counts))
        if view.kind == "token":
            tokens = label.specific_items(counts, n=settings.n_tokens_kept)
    return Described(
        quantiles=statistics.quantiles(pairs),
        windows=examples.windows(pairs, places, corpus.tokens, window=settings.window, after=settings.after),
        n_clear=clear.n_fired,
        n_clear_held_out=counts.total.held_out,  # the same in every view
        tokens=tokens,
        rules=tuple(rules),
    )


def _joined(parts: list[Any]) -> Any:
    """Concatenate the arrays of equally built (nested) tuples."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    joined = [_joined(list(column)) for column in zip(*parts, strict=True)]
    return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)


def _relate(
    sae: SAE, model: Model, pairs: codes.Codes, corpus: Corpus, settings: IndexConfig, progress: Progress | None
) -> Related:
    def done(n: int) -> None:
        if progress:
            progress(n, 3, "neighbours and logits")

    hook_name, W_dec, W_U = sae.metadata.hook_name, sae.W_dec.detach(), model.unembed[:, : model.d_vocab]
    sample = neighbours.coactivation_sample(pairs, corpus.store_positions(), seed=settings.seed)
    by_coactivation = neighbours.by_coactivation(pairs, sample, n=settings.n_neighbours)
    done(1)
    by_cosine = neighbours.by_cosine(W_dec, n=settings.n_neighbours)
    done(2)
    reason = logits.why_no_table(hook_name, W_dec.shape[1], W_U.shape[0])
    if reason:
        effects = logits.empty_table(len(W_dec), settings.n_logits)
    else:
        effects = logits.logit_table(W_dec, W_U, model.final_norm_scale(), n=settings.n_logits)
    done(3)
    return Related(by_cosine, by_coactivation, len(sample), effects, reason or logits.DIRECT)


def _write_words(
    found: FoundFeatures,
    described: Described,
    related: Related,
    views: tuple[label.View, ...],
    corpus: Corpus,
    vocabulary: list[str],
    settings: IndexConfig,
) -> Written:
    effects = related.effects
    promotes = [
        label.listed([vocabulary[t] for t in ids if t >= 0]) if z > effects.noise_z else ""
        for ids, z in zip(effects.promoted_ids.tolist(), effects.z.tolist(), strict=True)
    ]
    families = list(zip(views, described.rules, strict=True))
    labels = label.write_labels(families, described.n_clear_held_out, found.n_fired, promotes, vocabulary)
    top = corpus.places(found.top_positions)
    return Written(labels, promotes, _top_tokens(top, corpus.tokens, vocabulary))


def _top_tokens(
    positions: Int[np.ndarray, "features n"], tokens: Int[np.ndarray, "rows context"], vocabulary: list[str]
) -> list[str]:
    """The most frequent token at the peaks of each feature's examples, the first of equals; "" without examples."""
    chosen = np.append(tokens.reshape(-1), -1)[positions]
    n_equal = ((chosen[:, :, None] == chosen[:, None]) & (chosen >= 0)[:, :, None]).sum(2)
    best = np.take_along_axis(chosen, n_equal.argmax(1)[:, None], 1)[:, 0]
    return [vocabulary[t] if t >= 0 else "" for t in best]


def _save_all(
    out: Path,
    found: FoundFeatures,
    chosen: Chosen,
    described: Described,
    related: Related,
    written: Written,
    corpus: Corpus,
    store: ActivationStore,
    vocabulary: list[str],
    settings: IndexConfig,
) -> None:
    # -1, an empty slot, picks the -1 at the end
    docs = np.append(corpus.docs.reshape(-1), -1)[corpus.places(chosen.positions)].astype(np.int32)
    windows, effects, tokens = described.windows, related.effects, described.tokens
    _save(
        out / "examples.safetensors",
        {
            "positions": chosen.positions,
            "token_ids": windows.token_ids,
            "acts": windows.acts,
            "peaks": windows.peaks.astype(np.int16),
            "docs": docs,
            "interval_edges": chosen.interval_edges,
        },
    )
    _save(
        out / "logits.safetensors",
        {
            "promoted_ids": effects.promoted_ids,
            "promoted_effects": effects.promoted_effects,
            "suppressed_ids": effects.suppressed_ids,
            "suppressed_effects": effects.suppressed_effects,
        },
    )
    _save(
        out / "neighbours.safetensors",
        {
            "cosine_features": related.by_cosine.features,
            "cosine_scores": related.by_cosine.scores,
            "coactivation_features": related.by_coactivation.features,
            "coactivation_scores": related.by_coactivation.scores,
        },
    )
    counts, edges = statistics.histograms(found.bin_counts, found.max, n_bins=settings.n_bins)
    _save(out / "histograms.safetensors", {"counts": counts, "edges": edges})
    _save(
        out / "tokens.safetensors",
        {
            "token_ids": tokens.items.astype(np.int32),
            "n_fired": tokens.n_fired.astype(np.int32),
            "n_clear": tokens.n_clear.astype(np.int32),
            "n_occurrences": np.bincount(corpus.tokens[:, 1:].reshape(-1), minlength=len(vocabulary)).astype(np.int64),
        },
    )
    with atomic.replacing(out / index.TABLE) as file:
        pq.write_table(_table(found, described, effects, written, corpus.n_tokens), file)
    _write_text(out / "vocabulary.json", vocabulary)
    titles = {str(doc): store.documents[doc].title for doc in np.unique(docs[docs >= 0]).tolist()}
    _write_text(out / "titles.json", titles)


def _table(
    found: FoundFeatures, described: Described, effects: logits.LogitTable, written: Written, n_tokens: int
) -> pa.Table:
    labels, quantiles = written.labels, described.quantiles.astype(np.float32)
    return pa.table(
        {
            "feature": np.arange(len(labels), dtype=np.int32),
            "density": found.n_fired / n_tokens,
            "n_fired": found.n_fired,
            "n_clear": described.n_clear,
            "max": found.max,
            "mean": found.mean.astype(np.float32),
            "q50": quantiles[:, 0],
            "q90": quantiles[:, 1],
            "q99": quantiles[:, 2],
            "label": [each.text for each in labels],
            "label_kind": [each.kind for each in labels],
            "label_precision": pa.array([each.precision for each in labels], pa.float64()),
            "label_recall": pa.array([each.recall for each in labels], pa.float64()),
            "label_f1": pa.array([each.f1 for each in labels], pa.float64()),
            "label_n_held_out": pa.array([each.n_held_out for each in labels], pa.int64()),
            "rule_previous": pa.array([[item.previous for item in each.rule] for each in labels], pa.list_(pa.int32())),
            "rule_token": pa.array([[item.token for item in each.rule] for each in labels], pa.list_(pa.int32())),
            "promoted": written.promotes,
            "logit_z": effects.z,
            "top_token": written.top_tokens,
        }
    )


def _save(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    with atomic.replacing(path) as file:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, file)


def _write_text(path: Path, value: Mapping[str, str] | list[str]) -> None:
    """Compact JSON: a vocabulary has tens of thousands of entries."""
    atomic.write_bytes(path, json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _entry(path: Path) -> index.FileEntry:
    return index.FileEntry(name=path.name, bytes=path.stat().st_size, sha256=atomic.sha256(path))
