"""Definition of the BatchTopK encoder: all pre-activations of the batch, then the k N largest positive ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saelab_kernels.above import reference as above
from saelab_kernels.ragged import Ragged


def encode_batchtopk(x: Tensor, W: Tensor, b: Tensor, n_kept: int) -> Ragged:
    """x [N, d], W [F, d], b [F] -> the ``n_kept`` largest of ``relu(x @ W.T + b)`` that are above 0."""
    acts = F.linear(x, W, b).relu()
    found = above.above(acts, acts.new_zeros(len(W)))
    return keep_largest(found, n_kept)


def keep_largest(found: Ragged, n_kept: int) -> Ragged:
    """The ``n_kept`` largest activations of a ragged batch, with all that equal the smallest; NaN counts as largest."""
    if len(found.acts) <= n_kept:
        return found
    return not_below(found, found.acts.detach().kthvalue(len(found.acts) - n_kept + 1).values)


def not_below(found: Ragged, smallest: Tensor) -> Ragged:
    """The activations that are not below ``smallest``, a scalar."""
    kept = ~(found.acts < smallest)
    n_before = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    return Ragged(found.acts[kept], found.features[kept], n_before[found.offsets])
