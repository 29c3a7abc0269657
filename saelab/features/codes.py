"""Encode cached activations into sparse pairs (position, feature, value), kept on disk and read feature by feature.

A position is ``row * context + column`` among the indexed rows. Position-major pairs go to two flat files, 8 bytes a
pair; ``by_feature`` turns a block of features over to feature-major order, in which every statistic is a segment of an
array. Memory is bounded by the largest block (16 bytes a pair of it), not by the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int

from saelab import atomic

if TYPE_CHECKING:
    from saelab.activations.store import ActivationStore
    from saelab.sae.base import SAE

Progress = Callable[[int, int, str], None]

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


@torch.inference_mode()
def encode(
    sae: SAE,
    store: ActivationStore,
    rows: Int[np.ndarray, " rows"],
    folder: Path,
    *,
    hook_name: str,
    chunk_rows: int = 64,
    progress: Progress | None = None,
) -> Codes:
    """Feature activations of every position of ``rows`` but the first (BOS), written to ``folder`` and memory-mapped.

    Raises:
        ArtifactError: the disk is full.
    """
    d_sae, context = sae.W_dec.shape[0], store.context
    n_active = np.zeros((len(rows), context), np.int64)
    n_fired = np.zeros(d_sae, np.int64)
    features_file, values_file = folder / "features.bin", folder / "values.bin"
    with (
        atomic.replacing(features_file) as features_part,
        atomic.replacing(values_file) as values_part,
        features_part.open("wb") as features_out,
        values_part.open("wb") as values_out,
    ):
        for start in range(0, len(rows), chunk_rows):
            chunk = rows[start : start + chunk_rows]
            acts = store.acts(hook_name, chunk)[:, 1:].to(sae.W_dec.device, torch.float32)
            codes = sae.sparse_codes(acts.reshape(-1, acts.shape[-1]))
            fires = codes.values > 0
            positions, features = codes.rows[fires].cpu().numpy(), codes.features[fires].cpu().numpy()
            counts = np.bincount(positions, minlength=len(chunk) * (context - 1))
            n_active[start : start + len(chunk), 1:] = counts.reshape(len(chunk), context - 1)
            n_fired += np.bincount(features, minlength=d_sae)
            features_out.write(features.astype(np.int32).tobytes())
            values_out.write(codes.values[fires].float().cpu().numpy().tobytes())
            if progress:
                progress(min(start + chunk_rows, len(rows)), len(rows), "rows encoded")
    offsets = np.concatenate([[0], np.cumsum(n_active)])
    return Codes(offsets, _mapped(features_file, np.int32), _mapped(values_file, np.float32), n_fired)


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
