"""Which features resemble each other: in direction (decoder cosine) and in use (co-activation).

Co-activation is the Jaccard index of the sets of tokens on which two features fire, |A and B| / |A or B|. It is
symmetric and small when either feature fires much more often than the other; the conditional share P(B | A) would make
the densest features everybody's neighbour.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.features.codes import Codes
from saelab_kernels.search.hashing import hash64

#: Scores of pairs of features held at a time; 32 MB in float32.
_BLOCK_SCORES = 1 << 23

#: Two features that fired together less often than this are not called neighbours.
MIN_TOGETHER = 5

#: Pairs of features active on one token, summed over tokens, that are counted at most: a few seconds of one core.
MAX_PRODUCTS = 200_000_000


class Nearest(NamedTuple):
    """Best first; feature -1 where there are fewer."""

    features: Int[np.ndarray, "features n"]
    scores: Float[np.ndarray, "features n"]


def by_cosine(W_dec: Float[Tensor, "d_sae d_out"], *, n: int) -> Nearest:
    """The ``n`` features with the highest cosine to each one's decoder row, itself left out."""
    d_sae = len(W_dec)
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    found = _empty(d_sae, n)
    step = max(1, _BLOCK_SCORES // d_sae)
    for low in range(0, d_sae, step):
        scores = (unit[low : low + step] @ unit.T).cpu().numpy()
        rows = np.arange(len(scores))
        scores[rows, low + rows] = -np.inf
        _keep_best(found, low, scores, least=-np.inf)
    return found


def by_coactivation(codes: Codes, sample: np.ndarray, *, n: int) -> Nearest:
    """The ``n`` features with the highest Jaccard index to each, over the positions ``sample`` (increasing).

    Pairs that fired together fewer than ``MIN_TOGETHER`` times are left out.
    """
    matrix = codes.matrix()
    d_sae = matrix.shape[1]
    if len(sample) < matrix.shape[0]:
        matrix = matrix[sample]
    fires = scipy.sparse.csr_array((np.ones(matrix.nnz, np.float32), matrix.indices, matrix.indptr), shape=matrix.shape)
    by_feature = fires.T.tocsr()
    n_fired = np.diff(by_feature.indptr)
    found = _empty(d_sae, n)
    step = max(1, _BLOCK_SCORES // d_sae)
    for low in range(0, d_sae, step):
        together = (by_feature[low : low + step] @ fires).toarray()
        rows = np.arange(len(together))
        either = n_fired[low + rows][:, None] + n_fired[None] - together
        scores = np.where(together >= MIN_TOGETHER, together / np.maximum(either, 1), 0).astype(np.float32)
        scores[rows, low + rows] = 0
        _keep_best(found, low, scores, least=0.0)
    return found


def coactivation_sample(
    codes: Codes, store_positions: Int[np.ndarray, " positions"], *, seed: int
) -> Int[np.ndarray, " sample"]:
    """All positions with an active feature, or a uniform sample of them that needs at most about ``MAX_PRODUCTS``.

    The sample is chosen by a hash of each position in the store.
    """
    active = np.diff(codes.offsets)
    positions = np.flatnonzero(active)
    products = float((active.astype(np.float64) ** 2).sum())
    if products <= MAX_PRODUCTS:
        return positions
    keys = hash64(seed, np.zeros_like(positions), store_positions[positions])
    return positions[keys.astype(np.float64) < MAX_PRODUCTS / products * 2.0**64]


def _empty(d_sae: int, n: int) -> Nearest:
    return Nearest(np.full((d_sae, n), -1, np.int32), np.zeros((d_sae, n), np.float32))


def _keep_best(found: Nearest, low: int, scores: Float[np.ndarray, "block d_sae"], *, least: float) -> None:
    """Write the best of each row into ``found``: above ``least``, highest first, of equals the lower feature first."""
    n = min(found.features.shape[1], scores.shape[1])
    # an order-preserving map from float32 to int32 with the column below it makes ties impossible
    bits = (scores + np.float32(0)).view(np.int32)
    ordered = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits).astype(np.int64)
    keys = ordered << 32 | np.arange(scores.shape[1] - 1, -1, -1)
    best = np.sort(np.partition(keys, scores.shape[1] - n, axis=1)[:, scores.shape[1] - n :], axis=1)[:, ::-1]
    columns = scores.shape[1] - 1 - (best & 0xFFFFFFFF)
    values = np.take_along_axis(scores, columns, axis=1)
    real = values > least
    found.features[low : low + len(scores), :n] = np.where(real, columns, -1)
    found.scores[low : low + len(scores), :n] = np.where(real, values, 0)
