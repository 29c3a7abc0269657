"""Definition of the reconstruction loss of sparse codes and of its gradient, with dense activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_loss(
    top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor, target: Tensor, ends: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """loss [N], errors [len(ends), N, d], the gradient of loss for ``top_acts`` [N, k]. torch differentiates the loss.

    ``errors[p]`` is the sum of the errors of prefix p and of all longer ones.
    """
    feature_acts = top_acts.new_zeros(len(top_acts), len(W_dec)).scatter_add(1, top_indices, top_acts)
    each = torch.stack([F.linear(feature_acts[:, :end], W_dec[:end].T, b_dec) - target for end in ends])
    errors = each.flip(0).cumsum(0).flip(0)
    groups = zip(errors, (0, *ends[:-1]), ends, strict=True)
    grads = torch.cat([2 * error @ W_dec[start:end].T for error, start, end in groups], dim=1)
    return each.pow(2).sum((0, 2)), errors, grads.gather(1, top_indices)
