"""Sparse activations as pairs (position, feature, value), written to disk row by row and read feature by feature.

A position is ``row * context + column`` among the indexed rows. Position-major pairs go to two flat files, 8 bytes a
pair; ``by_feature`` turns a block of features over to feature-major order, in which every statistic is a segment of an
array. Memory is bounded by the largest block (16 bytes a pair of it), not by the number of tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int

from saelab import atomic
from saelab.errors import ArtifactError

#: Pairs turned over at a time; what is computed from them needs about 100 bytes a pair, so 0.8 GB.
BLOCK_PAIRS = 1 << 23


class Codes(NamedTuple):
    """Position-major pairs: those of position p are ``offsets[p]:offsets[p + 1]``."""

    offsets: Int[np.ndarray, " positions_plus_1"]
    features: Int[np.ndarray, " pairs"]
    values: Float[np.ndarray, " pairs"]
    """Above 0."""
    n_fired: Int[np.ndarray, " features"]

    def matrix(self) -> scipy.sparse.csr_array:
        """Positions by features."""
        shape = (len(self.offsets) - 1, len(self.n_fired))
        return scipy.sparse.csr_array((self.values, self.features, self.offsets), shape=shape)


@dataclass(frozen=True)
class Pairs:
    """Feature-major pairs of a block of features: those of feature f are ``offsets[f]:offsets[f + 1]``, by position."""

    offsets: Int[np.ndarray, " features_plus_1"]
    positions: Int[np.ndarray, " pairs"]
    values: Float[np.ndarray, " pairs"]

    @property
    def n_features(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def n_fired(self) -> Int[np.ndarray, " features"]:
        return np.diff(self.offsets)

    @cached_property
    def features(self) -> Int[np.ndarray, " pairs"]:
        """Feature of each pair, counted from the block's first."""
        return np.repeat(np.arange(self.n_features), self.n_fired)

    def above(self, floors: Float[np.ndarray, " features"]) -> Pairs:
        """Those whose value reaches the floor of their feature."""
        kept = self.values >= floors[self.features]
        n_kept = np.bincount(self.features[kept], minlength=self.n_features)
        return Pairs(np.concatenate([[0], np.cumsum(n_kept)]), self.positions[kept], self.values[kept])


class CodesFiles:
    """The pairs on disk, appended row by row: ``features.bin``, ``values.bin``, and how many each position has in
    ``counts.bin``. What was appended after the last ``sync`` may be lost in a kill, and ``cut`` drops it."""

    def __init__(self, folder: Path, *, context: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.context = context
        self.features, self.values, self.counts = (folder / f"{name}.bin" for name in ("features", "values", "counts"))

    def cut(self, n_rows: int) -> None:
        """Keep the first ``n_rows`` rows.

        Raises:
            ArtifactError: there are fewer.
        """
        for file in self._all():
            file.touch()
        n_positions = n_rows * self.context
        counts = np.fromfile(self.counts, np.int32, n_positions)
        n_pairs = int(counts.sum())
        for file, n in zip(self._all(), (n_pairs, n_pairs, n_positions), strict=True):
            if file.stat().st_size < 4 * n:
                raise ArtifactError(f"{file} is damaged (it is shorter than its checkpoint says); start anew")
            os.truncate(file, 4 * n)

    def append(
        self,
        positions: Int[np.ndarray, " pairs"],
        features: Int[np.ndarray, " pairs"],
        values: Float[np.ndarray, " pairs"],
        *,
        n_rows: int,
    ) -> None:
        """The pairs of the next ``n_rows`` rows by position, which is counted from the first of these rows.

        Raises:
            ArtifactError: the disk is full.
        """
        counts = np.bincount(positions, minlength=n_rows * self.context)
        columns = features.astype(np.int32), values.astype(np.float32), counts.astype(np.int32)
        for file, column in zip(self._all(), columns, strict=True):
            with atomic.explained(file), file.open("ab") as stream:
                stream.write(column.tobytes())

    def sync(self) -> None:
        """Force what was appended to the disk.

        Raises:
            ArtifactError: it is full.
        """
        for file in self._all():
            with atomic.explained(file):
                atomic.fsync(file)

    def read(self, n_fired: Int[np.ndarray, " features"]) -> Codes:
        """Everything appended, memory-mapped."""
        offsets = np.concatenate([[0], np.cumsum(np.fromfile(self.counts, np.int32), dtype=np.int64)])
        return Codes(offsets, _mapped(self.features, np.int32), _mapped(self.values, np.float32), n_fired)

    def _all(self) -> tuple[Path, Path, Path]:
        return self.features, self.values, self.counts


def blocks(n_fired: Int[np.ndarray, " features"], *, max_pairs: int = BLOCK_PAIRS) -> Iterator[tuple[int, int]]:
    """Ranges of features with at most ``max_pairs`` pairs each (a single feature may have more)."""
    total = np.concatenate([[0], np.cumsum(n_fired)])
    low = 0
    while low < len(n_fired):
        high = max(low + 1, int(np.searchsorted(total, total[low] + max_pairs, side="right")) - 1)
        yield low, high
        low = high


def by_feature(codes: Codes, low: int, high: int) -> Pairs:
    """The pairs of features ``low`` to ``high - 1``, by feature and then by position."""
    matrix = codes.matrix()
    if (low, high) != (0, matrix.shape[1]):
        matrix = matrix[:, low:high]
    # a counting sort: rows are scanned in order, so the positions of each feature come out ascending
    turned = matrix.tocsc()
    return Pairs(turned.indptr.astype(np.int64), turned.indices, turned.data)


def _mapped(path: Path, dtype: type) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
