"""The index of a dictionary's features: opened in milliseconds, memory-mapped, one record at a time.

    index.json               what it was made from, and the size and checksum of every file
    features.parquet         one row a feature: statistics and label
    examples.safetensors     top and interval examples with their windows
    logits.safetensors       promoted and suppressed tokens
    neighbours.safetensors   by decoder cosine and by co-activation
    histograms.safetensors   of the positive activations
    tokens.safetensors       the tokens on which each feature fires most, and how often each token occurs
    vocabulary.json          the text of every token, so that readers need no tokenizer
    titles.json              titles of the documents that the examples come from

Nothing here imports torch, so pages that only read an index start fast.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from saelab import atomic, rundir
from saelab import config as configs
from saelab.errors import ArtifactError, ConfigError, ShapeError, nearest
from saelab.features import lookup
from saelab.features.config import IndexConfig
from saelab.features.records import (
    Example,
    FeatureRecord,
    Histogram,
    Label,
    Neighbour,
    Quantiles,
    RuleItem,
    SearchHit,
    TokenCount,
    TokenEffect,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from saelab.activations.store import ActivationStore
    from saelab.models.load import Model
    from saelab.sae.base import SAE

SCHEMA = 2
TABLE = "features.parquet"
TENSORS = tuple(f"{name}.safetensors" for name in ("examples", "logits", "neighbours", "histograms", "tokens"))
TEXTS = ("vocabulary.json", "titles.json")

#: Files up to this size are hashed whenever an index is opened; larger ones only by ``verify``.
SMALL_BYTES = 1 << 20

_AGAIN = "build the index again with: saelab index"

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """Content of index.json."""

    schema: int
    n_features: int
    n_tokens: int
    """Tokens behind every density: the indexed rows without their BOS."""
    n_rows: int
    context: int
    window: int
    model_name: str
    model_sha256: str
    hook_name: str
    d_vocab: int
    sae_sha256: str | None
    """Fingerprint of the SAE's directory; none for one that was never saved."""
    activations_sha256: str
    n_coactivation_tokens: int
    """Tokens behind the co-activation neighbours: all of them, or a uniform sample where all would take too long."""
    logits: str
    """How the effects on the logits were computed, or why there are none."""
    logit_z_noise: float
    """What logit_z stays below for 99 % of random directions."""
    files: tuple[FileEntry, ...]


class TokenCounts(NamedTuple):
    token_ids: Int[np.ndarray, "features kept"]
    """Tokens each feature is most specific to, best first; -1 where there are fewer."""
    n_fired: Int[np.ndarray, "features kept"]
    """Firings of the feature on that token; ``n_clear`` of them reach a quarter of its maximum."""
    n_clear: Int[np.ndarray, "features kept"]
    n_occurrences: Int[np.ndarray, " d_vocab"]
    """How often each token of the vocabulary occurs."""


class FeatureIndex:
    """Read access to an index directory; safe to share between threads."""

    def __init__(self, path: Path, manifest: IndexManifest, settings: IndexConfig) -> None:
        self.path = path
        self.manifest = manifest
        self.config = settings
        self._columns: dict[str, np.ndarray] = {}
        self._slices: dict[tuple[str, str], Any] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: Literal["sizes", "full"] = "sizes") -> FeatureIndex:
        """The index at ``path``: its directory, or a workspace that holds one.

        Sizes of all files and checksums of the small ones are checked; ``verify="full"`` checks every checksum.

        Raises:
            ArtifactError: no finished index there, or a file is missing or damaged (it is named).
        """
        path = rundir.find(path, "index")
        index = cls(path, _manifest(path), _settings(path))
        index._check(lambda entry: verify == "full" or entry.bytes <= SMALL_BYTES)
        return index

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            ArtifactError: a file is missing or damaged (it is named).
        """
        self._check(lambda entry: True)

    def __len__(self) -> int:
        return self.n_features

    def __repr__(self) -> str:
        return f"FeatureIndex({self.path}, {self.n_features} features of {self.hook_name}, {self.n_tokens} tokens)"

    @property
    def n_features(self) -> int:
        return self.manifest.n_features

    @property
    def n_tokens(self) -> int:
        """Tokens behind every density."""
        return self.manifest.n_tokens

    @property
    def hook_name(self) -> str:
        return self.manifest.hook_name

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Text of every token, by id."""
        return tuple(json.loads((self.path / "vocabulary.json").read_text("utf-8")))

    @cached_property
    def titles(self) -> dict[int, str]:
        """Titles of the documents that the examples come from."""
        return {int(doc): title for doc, title in json.loads((self.path / "titles.json").read_text("utf-8")).items()}

    @cached_property
    def spellings(self) -> dict[str, list[int]]:
        """Ids of the tokens that read the same regardless of case and surrounding space."""
        ids: dict[str, list[int]] = {}
        for token, text in enumerate(self.vocabulary):
            ids.setdefault(text.strip().casefold(), []).append(token)
        return ids

    @cached_property
    def table(self) -> pa.Table:
        """One row a feature: feature, density, n_fired, n_clear, max, mean, q50, q90, q99, label, label_kind,
        label_precision, label_recall, label_f1, label_n_held_out, rule_previous, rule_token, promoted ("" where no
        effect stands out), logit_z, top_token (most frequent at the peaks of the top examples)."""
        import pyarrow.parquet as pq

        # pq.read_table would import pyarrow.dataset, half a second for nothing
        return pq.ParquetFile(self.path / TABLE, memory_map=True).read()

    def column(self, name: str) -> np.ndarray:
        """A column of the table, by feature; null becomes NaN in columns of numbers.

        Raises:
            ConfigError: there is no such column.
        """
        if name not in self._columns:
            if name not in self.table.column_names:
                raise ConfigError(f"the index has no column {name!r}; {nearest(name, self.table.column_names)}")
            self._columns[name] = self.table[name].to_numpy()
        return self._columns[name]

    def feature(self, i: int) -> FeatureRecord:
        """Everything known about feature ``i``.

        Raises:
            ShapeError: there is no feature ``i``.
        """
        i = self._checked(i)
        max_act = float(self.column("max")[i])
        counts, edges = (self._tensor("histograms.safetensors", name, i).tolist() for name in ("counts", "edges"))
        top, intervals = self._examples(i)
        return FeatureRecord(
            index=i,
            density=float(self.column("density")[i]),
            n_fired=int(self.column("n_fired")[i]),
            n_clear=int(self.column("n_clear")[i]),
            max_act=max_act,
            mean_act=float(self.column("mean")[i]),
            quantiles=Quantiles(*(float(self.column(name)[i]) for name in Quantiles._fields)),
            histogram=Histogram(tuple(edges), tuple(counts)),
            top_examples=top,
            interval_examples=intervals,
            interval_edges=tuple(self._tensor("examples.safetensors", "interval_edges", i).tolist()),
            tokens=self._tokens(i),
            promoted=self._effects(i, "promoted"),
            suppressed=self._effects(i, "suppressed"),
            logit_z=float(self.column("logit_z")[i]),
            stands_out=float(self.column("logit_z")[i]) > self.manifest.logit_z_noise,
            neighbours_cosine=self._neighbours(i, "cosine"),
            neighbours_coactivation=self._neighbours(i, "coactivation"),
            label=self.label(i),
        )

    def label(self, i: int) -> Label:
        """The label of feature ``i`` alone, cheaper than its whole record."""
        i = self._checked(i)
        kind = self.column("label_kind")[i]
        scored = not np.isnan(self.column("label_precision")[i])
        pairs = zip(self.table["rule_previous"][i].as_py(), self.table["rule_token"][i].as_py(), strict=True)
        return Label(
            text=self.column("label")[i],
            kind=kind,
            rule=tuple(RuleItem(previous, token) for previous, token in pairs),
            precision=float(self.column("label_precision")[i]) if scored else None,
            recall=float(self.column("label_recall")[i]) if scored else None,
            n_held_out=int(self.column("label_n_held_out")[i]),
        )

    def search(self, text: str, *, n: int = 10) -> list[SearchHit]:
        """Features that describe ``text``, without a model: by their labels and by the tokens they fire on.

        ``features_in_text`` finds those that really fire on it, by running the model.

        Raises:
            TextError: ``text`` holds no word.
        """
        return lookup.by_text(self, text, n=n)

    def search_token(self, token: str | int, *, n: int = 10) -> list[SearchHit]:
        """Features most specific to a token, by id or by text (spelled exactly, else regardless of case).

        Raises:
            TextError: the vocabulary has no such token.
        """
        return lookup.by_token(self, token, n=n)

    def by_density(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Features whose density lies within ``low`` and ``high`` (both included), in increasing order."""
        density = self.column("density")
        return np.flatnonzero((density >= low) & (density <= high))

    def nearest(
        self, i: int, *, by: Literal["cosine", "coactivation"] = "cosine", n: int = 10
    ) -> tuple[Neighbour, ...]:
        """Nearest features to ``i``, best first; at most as many as the index keeps."""
        return self._neighbours(self._checked(i), by)[:n]

    def most_token_specific(self, n: int = 10, *, min_support: int = 20, max_density: float = 0.01) -> list[int]:
        """Features with a label of kind "token", highest held-out precision first; the higher held-out F1 wins a tie.

        Only rules that match at least ``min_support`` held-out positions are considered, and only features that fire on
        at most ``max_density`` of the tokens: those for "the" or a comma are as precise, but say nothing about a text.
        """
        support, precision, f1 = (self.column(f"label_{name}") for name in ("n_held_out", "precision", "f1"))
        specific = (self.column("label_kind") == "token") & (self.column("density") <= max_density)
        chosen = np.flatnonzero(specific & (support >= min_support))
        return chosen[np.lexsort((chosen, -f1[chosen], -precision[chosen]))][:n].tolist()

    def trigger_tokens(self, i: int) -> tuple[int, ...]:
        """Token ids on which feature ``i`` fires by its own rule; empty unless its label is of kind "token"."""
        label = self.label(i)
        return tuple(item.token for item in label.rule if item.token is not None) if label.kind == "token" else ()

    @cached_property
    def token_counts(self) -> TokenCounts:
        """The tokens kept of every feature, with their counts."""
        return TokenCounts(*(self._slice("tokens.safetensors", name)[:] for name in TokenCounts._fields))

    def _checked(self, i: int) -> int:
        i = operator.index(i)
        if not 0 <= i < self.n_features:
            raise ShapeError(f"there is no feature {i}; the index holds 0 to {self.n_features - 1}")
        return i

    def _examples(self, i: int) -> tuple[tuple[Example, ...], tuple[tuple[Example, ...], ...]]:
        """Slots are the top examples, then those of each interval; an empty slot has position -1."""
        fields = ("positions", "token_ids", "acts", "peaks", "docs")
        slots = list(zip(*(self._tensor("examples.safetensors", name, i).tolist() for name in fields), strict=True))
        examples = [self._example(*slot) if slot[0] >= 0 else None for slot in slots]
        n_top, per = self.config.n_examples, self.config.per_interval
        starts = range(n_top, n_top + self.config.n_intervals * per, per)
        groups = [examples[:n_top], *(examples[start : start + per] for start in starts)]
        top, *intervals = (tuple(example for example in group if example is not None) for group in groups)
        return top, tuple(intervals)

    def _example(self, position: int, ids: list[int], acts: list[float], peak: int, doc: int) -> Example:
        shown = ids[: ids.index(-1)] if -1 in ids else ids
        row, column = divmod(position, self.manifest.context)
        return Example(
            tokens=tuple(self.vocabulary[t] for t in shown),
            token_ids=tuple(shown),
            acts=tuple(acts[: len(shown)]),
            peak=peak,
            doc=doc,
            title=self.titles.get(doc, ""),
            row=row,
            position=column,
        )

    def _tokens(self, i: int) -> tuple[TokenCount, ...]:
        counts = self.token_counts
        rows = zip(*(table[i].tolist() for table in (counts.token_ids, counts.n_fired, counts.n_clear)), strict=True)
        shown = [row for row in rows if row[0] >= 0]
        return tuple(TokenCount(self.vocabulary[t], t, n, m, int(counts.n_occurrences[t])) for t, n, m in shown)

    def _effects(self, i: int, side: str) -> tuple[TokenEffect, ...]:
        ids = self._tensor("logits.safetensors", f"{side}_ids", i).tolist()
        effects = self._tensor("logits.safetensors", f"{side}_effects", i).tolist()
        return tuple(TokenEffect(self.vocabulary[t], t, e) for t, e in zip(ids, effects, strict=True) if t >= 0)

    def _neighbours(self, i: int, by: str) -> tuple[Neighbour, ...]:
        features = self._tensor("neighbours.safetensors", f"{by}_features", i).tolist()
        scores = self._tensor("neighbours.safetensors", f"{by}_scores", i).tolist()
        return tuple(Neighbour(f, s) for f, s in zip(features, scores, strict=True) if f >= 0)

    def _tensor(self, file: str, name: str, i: int) -> np.ndarray:
        return self._slice(file, name)[int(i)]

    def _slice(self, file: str, name: str) -> Any:
        if (file, name) not in self._slices:
            from safetensors import SafetensorError, safe_open

            try:
                self._slices[file, name] = safe_open(self.path / file, framework="np").get_slice(name)
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{self.path / file} is damaged ({error}); {_AGAIN}") from error
        return self._slices[file, name]

    def _check(self, hashed: Callable[[FileEntry], bool]) -> None:
        for entry in self.manifest.files:
            file = self.path / entry.name
            if not file.exists():
                raise ArtifactError(f"{file} is missing; {_AGAIN}")
            size = file.stat().st_size
            if size != entry.bytes:
                raise ArtifactError(f"{file} has {size} bytes instead of {entry.bytes}; {_AGAIN}")
            if hashed(entry) and atomic.sha256(file) != entry.sha256:
                raise ArtifactError(f"{file} is damaged (its checksum differs); {_AGAIN}")


def load_index(path: str | Path) -> FeatureIndex:
    """The index at ``path``, or the one in the workspace ``path``; see ``FeatureIndex.open``."""
    return FeatureIndex.open(path)


def build_index(
    sae: SAE,
    store: ActivationStore,
    model: Model,
    out: str | Path,
    *,
    config: IndexConfig | None = None,
    sae_path: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> FeatureIndex:
    """Index every feature of ``sae`` over the activations in ``store``; see ``saelab.features.build`` for the how.

    With ``resume`` a build in ``out`` that was killed goes on, to the same bytes.
    """
    from saelab.features import build

    build.build(
        sae,
        store,
        model,
        Path(out),
        settings=config or IndexConfig(),
        sae_path=Path(sae_path) if sae_path else None,
        resume=resume,
        progress=progress,
    )
    return FeatureIndex.open(out)


def _manifest(path: Path) -> IndexManifest:
    file = path / "index.json"
    try:
        manifest = configs.from_mapping(IndexManifest, dict(json.loads(file.read_text("utf-8"))))
    except FileNotFoundError:
        raise ArtifactError(f"{file} is missing; {_AGAIN}") from None
    except (ValueError, TypeError, ConfigError) as error:
        raise ArtifactError(f"{file} is damaged ({error}); {_AGAIN}") from error
    if manifest.schema != SCHEMA:
        raise ArtifactError(f"{path} has index schema {manifest.schema}, this saelab reads {SCHEMA}; {_AGAIN}")
    return manifest


def _settings(path: Path) -> IndexConfig:
    return configs.from_mapping(IndexConfig, rundir.read_run(path, "index")["config"])
