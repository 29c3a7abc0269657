"""Weight gradients of sparse layers: sums over the pairs of each feature, without atomics and without [N, k, d]."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab_kernels import arguments, compiled, dispatch
from saelab_kernels.grads import cpu, reference
from saelab_kernels.pairs import Pairs


def feature_grad(pairs: Pairs, coefficients: Tensor, vectors: Tensor) -> Tensor:
    """``out[f] = sum over the pairs (n, j) of feature f of coefficients[n, j] * vectors[n]``, [F, d]. No autograd.

    ``coefficients`` [P], or [N, k] of a TopK batch; vectors [N, d]. One writer a row and a fixed order (ascending
    tokens): two runs are bitwise equal. A feature without a pair gets 0.

    Raises:
        TypeError: not floating-point.
        ValueError: not one coefficient for each pair, or ``vectors`` not [N, d].
    """
    arguments.check_matrix("vectors", vectors)
    _check_coefficients(pairs, coefficients)
    dtype = arguments.computing_dtype(coefficients, vectors)
    k = -(-len(pairs.order) // max(len(vectors), 1))
    path = dispatch.choose(vectors.device, n_features=len(pairs.starts) - 1, k=k).name
    values = coefficients.detach().to(dtype).flatten()[pairs.order]
    if path == "fused" and dtype == torch.float32:  # float64 is for checks
        from saelab_kernels.grads import fused

        return compiled.or_else(
            "feature_grad",
            lambda: fused.weighted_sums(pairs, values, vectors.detach()),
            lambda: reference.weighted_sums(pairs, values, vectors.detach().to(dtype)),
            strict=dispatch.strict(),
        )
    return (cpu if path == "cpu" else reference).weighted_sums(pairs, values, vectors.detach().to(dtype))


def feature_sum(pairs: Pairs, coefficients: Tensor) -> Tensor:
    """``out[f] = sum over the pairs (n, j) of feature f of coefficients[n, j]``, [F], as for b_enc. No autograd.

    Raises:
        TypeError: not floating-point.
        ValueError: not one coefficient for each pair.
    """
    _check_coefficients(pairs, coefficients)
    values = coefficients.detach().to(arguments.computing_dtype(coefficients)).flatten()[pairs.order]
    path = dispatch.choose(values.device, n_features=len(pairs.starts) - 1, k=1, gathers=False).name
    if path == "fused" and values.dtype == torch.float32:
        from saelab_kernels.grads import fused

        return compiled.or_else(
            "feature_sum",
            lambda: fused.sums(pairs, values),
            lambda: reference.sums(pairs, values),
            strict=dispatch.strict(),
        )
    return reference.sums(pairs, values)


def _check_coefficients(pairs: Pairs, coefficients: Tensor) -> None:
    if not coefficients.is_floating_point():
        raise TypeError(f"coefficients must be a floating-point tensor, got {coefficients.dtype}")
    if coefficients.numel() != len(pairs.order):
        shape = list(coefficients.shape)
        raise ValueError(f"coefficients must have one entry for each of the {len(pairs.order)} pairs, got {shape}")
