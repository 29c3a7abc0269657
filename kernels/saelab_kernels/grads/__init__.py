"""Weight gradients of sparse layers: sums over the pairs of each feature, without atomics and without [N, k, d]."""

from __future__ import annotations

from torch import Tensor

from saelab_kernels import arguments, dispatch
from saelab_kernels.grads import cpu, reference
from saelab_kernels.pairs import Pairs


def feature_grad(pairs: Pairs, coefficients: Tensor, vectors: Tensor) -> Tensor:
    """``out[f] = sum over the pairs (n, j) of feature f of coefficients[n, j] * vectors[n]``, [F, d]. No autograd.

    One writer a row and a fixed order (ascending tokens): two runs are bitwise equal. A feature without a pair gets 0.

    Raises:
        TypeError: not floating-point.
        ValueError: ``coefficients`` is not [N, k] as the pairs were made from, or ``vectors`` not [N, d].
    """
    arguments.check_matrix("vectors", vectors)
    arguments.check_matrix("coefficients", coefficients, rows=len(vectors))
    _check_count(pairs, coefficients)
    dtype = arguments.computing_dtype(coefficients, vectors)
    path = dispatch.choose(vectors.device, n_features=len(pairs.starts) - 1, k=coefficients.shape[1]).name
    values = coefficients.detach().to(dtype).flatten()[pairs.order]
    return (cpu if path == "cpu" else reference).weighted_sums(pairs, values, vectors.detach().to(dtype))


def feature_sum(pairs: Pairs, coefficients: Tensor) -> Tensor:
    """``out[f] = sum over the pairs (n, j) of feature f of coefficients[n, j]``, [F], as for b_enc. No autograd.

    Raises:
        TypeError: not floating-point.
        ValueError: ``coefficients`` is not [N, k] as the pairs were made from.
    """
    arguments.check_matrix("coefficients", coefficients)
    _check_count(pairs, coefficients)
    return reference.sums(pairs, coefficients.detach().flatten()[pairs.order])


def _check_count(pairs: Pairs, coefficients: Tensor) -> None:
    if coefficients.numel() != len(pairs.order):
        shape = list(coefficients.shape)
        raise ValueError(f"coefficients must have one entry for each of the {len(pairs.order)} pairs, got {shape}")
