"""Dot products of tokens with chosen rows of a weight matrix: gradients of activations, rescoring of candidates."""

from __future__ import annotations

from torch import Tensor

from saelab_kernels import arguments, compiled, dispatch
from saelab_kernels.dots import cpu, reference


def sampled_dot(vectors: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """``out[n, j] = vectors[n] . weights[indices[n, j]]`` [N, k], for vectors [N, d] and weights [F, d]. No autograd.

    Each entry is one sum in fixed order, so it does not depend on the batch around it.

    Raises:
        TypeError: not floating-point, or ``indices`` not int64.
        ValueError: shapes that do not fit, or an index out of range.
    """
    arguments.check_matrix("weights", weights)
    arguments.check_matrix("vectors", vectors, columns=weights.shape[1])
    arguments.check_indices(indices, n_features=len(weights))
    if len(indices) != len(vectors):
        raise ValueError(f"indices must have one row for each of the {len(vectors)} vectors, got {len(indices)}")
    dtype = arguments.computing_dtype(vectors, weights)
    vectors, weights = vectors.detach(), weights.detach()
    path = dispatch.path_for(weights, indices.shape[1], dtype=dtype)
    if path == "fused":
        from saelab_kernels.dots import fused

        return compiled.or_else(
            "sampled_dot",
            lambda: fused.sampled_dot(vectors, weights, indices),
            lambda: reference.sampled_dot(vectors.to(dtype), weights.to(dtype), indices),
            strict=dispatch.strict(),
        )
    return (cpu if path == "cpu" else reference).sampled_dot(vectors.to(dtype), weights.to(dtype), indices)
