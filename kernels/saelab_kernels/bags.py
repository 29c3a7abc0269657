"""Weighted sums of chosen rows on torch's own kernel: what decoding, gradients and the training step are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_bags(indices: Tensor, starts: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """``out[i] = sum over p in starts[i]:starts[i + 1] of weights[p] * rows[indices[p]]`` [B, d], in the order of p.

    indices [P] and starts [B+1] int64 or int32, weights [P], rows [R, d].
    """
    if not len(indices):  # embedding_bag refuses an empty batch
        return rows.new_zeros(len(starts) - 1, rows.shape[1])
    # 32-bit indices halve the bytes of the index stream and take the faster of embedding_bag's two routes
    indices, starts = indices.to(torch.int32), starts.to(torch.int32)
    return F.embedding_bag(
        indices, rows.contiguous(), starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
