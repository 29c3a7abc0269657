"""What the operations are given at a shape, and samples of it in float64 for their references."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import planted
from benchmarks.shapes import Shape

#: Tokens, and features, at which a result is compared with its reference.
SAMPLE = 48


class Inputs:
    """Tokens, unit rows for weights, the k largest pre-activations. Weights and tokens are bfloat16 on a GPU."""

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.generator = torch.Generator(device=device).manual_seed(0)
        n, width, features, _ = shape
        self.x = planted(n, width, n_directions=max(64, 2 * width), active=16, seed=0, device=device).to(self.dtype)
        self.grad = self.normal(n, width) / n
        self.W_enc = F.normalize(self.normal(features, width), dim=1)
        self.W_dec = F.normalize(self.normal(features, width), dim=1)
        self.b_enc = 0.1 * self.normal(features).float()
        self.b_dec = 0.1 * self.normal(width).float()

    def normal(self, *size: int) -> Tensor:
        """Random normal numbers in the inputs' precision."""
        return torch.randn(*size, generator=self.generator, device=self.device, dtype=self.dtype)

    @functools.cached_property
    def top(self) -> tuple[Tensor, Tensor]:
        """Activations float32 [N, k], largest first, and features int64 [N, k], as an encoder would give them."""
        # some tokens at a time, so that N x F is not what decides which shapes fit
        rows = max(1, 2**27 // self.shape.features)
        tops = [
            F.linear(block, self.W_enc, self.b_enc.to(self.dtype)).topk(self.shape.k, dim=1)
            for block in self.x.split(rows)
        ]
        return torch.cat([top.values for top in tops]).float().relu(), torch.cat([top.indices for top in tops])

    @functools.cached_property
    def acts_grad(self) -> Tensor:
        """A gradient of the activations, float32 [N, k]."""
        return self.normal(self.shape.tokens, self.shape.k).float() / self.shape.tokens

    @functools.cached_property
    def tokens(self) -> Tensor:
        """The sampled tokens, the first and the last among them."""
        return torch.linspace(0, self.shape.tokens - 1, min(SAMPLE, self.shape.tokens), device=self.device).long()

    @functools.cached_property
    def features(self) -> Tensor:
        """The sampled features: some that fire, among them the one that fires most, and the first and last of all."""
        firing, counts = self.top[1].unique(return_counts=True)
        spread = firing[torch.linspace(0, len(firing) - 1, SAMPLE, device=self.device).long()]
        most = firing[counts.argmax()]
        ends = torch.tensor([0, self.shape.features - 1], device=self.device)
        return torch.cat([spread, most[None], ends]).unique()


def exact_pre_acts(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """``x @ W.T + b`` in float64, some features at a time: a float64 copy of W may not fit."""
    x = x.double()
    parts = zip(W.split(2**14), b.split(2**14), strict=True)
    return torch.cat([F.linear(x, rows.double(), biases.double()) for rows, biases in parts], dim=1)


def packed(indices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``weights`` that ``indices`` name, in float64, and the same indices into them."""
    used, packed_indices = indices.unique(return_inverse=True)
    return packed_indices, weights[used].double()


def exact_sums(indices: Tensor, coefficients: Tensor, vectors: Tensor, features: Tensor) -> Tensor:
    """For each of ``features`` the sum over its pairs of coefficients [N, k] times vectors [N, d], in float64."""
    from saelab_kernels.grads import reference

    pairs, values = restricted(indices, coefficients, features)
    return reference.weighted_sums(pairs, values, vectors.double())


def restricted(indices: Tensor, coefficients: Tensor, features: Tensor) -> tuple[Any, Tensor]:
    """The pairs of ``features`` (ascending) alone, as features 0, 1, 2, ..., and their coefficients in float64."""
    from saelab_kernels import Pairs

    at = torch.searchsorted(features, indices.flatten()).clamp_max(len(features) - 1)
    chosen = (features[at] == indices.flatten()).nonzero().flatten()
    order = chosen[at[chosen].sort(stable=True).indices]
    ends = torch.bincount(at[chosen], minlength=len(features)).cumsum(0)
    pairs = Pairs(order, order // indices.shape[1], torch.cat([ends.new_zeros(1), ends]))
    return pairs, coefficients.flatten()[order].double()
