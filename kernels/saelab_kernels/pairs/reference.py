"""Definition of the feature-major order."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_pairs(top_indices: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """``order`` [N*k] that sorts ``top_indices.flatten()`` stably, and ``starts`` [F+1], where each feature begins."""
    features, order = torch.sort(top_indices.flatten(), stable=True)
    starts = torch.searchsorted(features, torch.arange(n_features + 1, device=features.device))
    return order, starts
