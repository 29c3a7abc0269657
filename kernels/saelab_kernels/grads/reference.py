"""Definition of the sums over a feature's pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab_kernels.pairs import Pairs


def weighted_sums(pairs: Pairs, values: Tensor, vectors: Tensor) -> Tensor:
    """[F, d] from the coefficient of each pair, in the order of the pairs, and vectors [N, d]."""
    grad = vectors.new_zeros(len(pairs.starts) - 1, vectors.shape[1])
    return grad.index_add_(0, _features(pairs), values[:, None] * vectors[pairs.tokens])


def sums(pairs: Pairs, values: Tensor) -> Tensor:
    """[F] from the coefficient of each pair, in the order of the pairs."""
    return values.new_zeros(len(pairs.starts) - 1).index_add_(0, _features(pairs), values)


def _features(pairs: Pairs) -> Tensor:
    counts = pairs.starts.diff()
    features = torch.arange(len(counts), device=counts.device)
    return torch.repeat_interleave(features, counts, output_size=len(pairs.order))
