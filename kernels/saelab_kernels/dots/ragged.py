"""Dot products of a ragged batch: each token with the rows of a weight matrix that its active features name."""

from __future__ import annotations

from torch import Tensor

from saelab_kernels import arguments, compiled, dispatch
from saelab_kernels.dots import cpu, reference
from saelab_kernels.ragged import Ragged


def ragged_dot(vectors: Tensor, weights: Tensor, active: Ragged) -> Tensor:
    """``out[p] = vectors[token of p] . weights[features[p]]`` [P], for vectors [N, d] and weights [F, d]. No autograd.

    Raises:
        TypeError: not floating-point, or features that are not int64.
        ValueError: shapes that do not fit, or a feature out of range.
    """
    arguments.check_matrix("weights", weights)
    arguments.check_matrix("vectors", vectors, rows=len(active.offsets) - 1, columns=weights.shape[1])
    arguments.check_indices(active.features[:, None], n_features=len(weights))
    dtype = arguments.computing_dtype(vectors, weights)
    vectors, weights = vectors.detach().to(dtype), weights.detach().to(dtype)
    path = dispatch.path_for(weights, 1, dtype=dtype)
    if path == "cpu":
        return cpu.ragged_dot(vectors, weights, active.offsets, active.features)
    if path == "reference":
        return reference.ragged_dot(vectors, weights, active)
    from saelab_kernels.dots import fused

    return compiled.or_else(
        "ragged_dot",
        lambda: fused.ragged_dot(vectors, weights, active.offsets, active.features),
        lambda: reference.ragged_dot(vectors, weights, active),
        strict=dispatch.strict(),
    )
