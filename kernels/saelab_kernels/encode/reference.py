"""Definition of the top-k encoder: all pre-activations, then the k largest."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def encode_topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [N, d], W [F, d], b [F] -> the k largest pre-activations [N, k], before any ReLU, and their indices."""
    pre_acts = F.linear(x, W, b)
    top_indices = largest(pre_acts.detach(), k)
    return pre_acts.gather(1, top_indices), top_indices


def largest(values: Tensor, k: int) -> Tensor:
    """Indices [N, k] of the k largest of ``values`` [N, F]: descending, equal values by ascending index, NaN first.

    torch.topk leaves open which of several equal values it takes, so rows with a tie at the border are sorted in full.
    """
    n_features = values.shape[1]
    top = values.topk(min(k + 1, n_features), dim=1)
    indices = top.indices[:, :k].sort(dim=1).values
    order = values.gather(1, indices).sort(dim=1, descending=True, stable=True).indices
    indices = indices.gather(1, order)
    if k < n_features:
        last, next_one = top.values[:, k - 1], top.values[:, k]
        torn = (last == next_one) | (last.isnan() & next_one.isnan())
        indices[torn] = values[torn].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return indices
