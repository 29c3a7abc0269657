"""Definition of the sampled dot product."""

from __future__ import annotations

from torch import Tensor


def sampled_dot(vectors: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Every dot product, then the chosen ones."""
    return (vectors @ weights.T).gather(1, indices)
