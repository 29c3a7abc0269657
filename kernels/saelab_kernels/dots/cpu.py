"""Sampled dot products on the CPU, without gathering rows: one pass that reads each chosen row in place.

torch.sparse.sampled_addmm computes exactly the dot products that a CSR pattern names. For 2048 x 40 dot products of
width 576 it takes 5 ms on one core; gathering the rows and multiplying takes 45 ms, batched matrix products 90 ms.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor


def sampled_dot(vectors: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """vectors [N, d], weights [F, d], indices int64 [N, k] -> [N, k]."""
    n_tokens, k = indices.shape
    starts = torch.arange(n_tokens + 1) * k
    return ragged_dot(vectors, weights, starts, indices.flatten()).view(n_tokens, k)


def ragged_dot(vectors: Tensor, weights: Tensor, starts: Tensor, features: Tensor) -> Tensor:
    """Dot products [n_pairs] of pairs in token-major order: token n owns ``features[starts[n]:starts[n + 1]]``."""
    _accept_beta_state()
    pattern = torch.sparse_csr_tensor(
        starts, features, vectors.new_zeros(len(features)), size=(len(vectors), len(weights)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, vectors.contiguous(), weights.contiguous().T, beta=0.0).values()


@functools.lru_cache(maxsize=1)
def _accept_beta_state() -> None:
    """torch warns once a process that CSR tensors are in beta; the tests here cover what we use of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        nothing = torch.tensor([], dtype=torch.int64)
        torch.sparse_csr_tensor(torch.tensor([0, 0]), nothing, nothing.float(), size=(1, 1), check_invariants=False)
