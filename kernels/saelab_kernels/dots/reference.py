"""Definition of the sampled dot product."""

from __future__ import annotations

from torch import Tensor

from saelab_kernels.ragged import Ragged


def sampled_dot(vectors: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Every dot product, then the chosen ones."""
    return (vectors @ weights.T).gather(1, indices)


def ragged_dot(vectors: Tensor, weights: Tensor, active: Ragged) -> Tensor:
    """The same for a ragged batch, [P]."""
    return (vectors @ weights.T)[active.tokens, active.features]
