"""What training must know of its inputs before the first step: their mean and how large they are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import TextError


@dataclass(frozen=True, eq=False)
class ActivationStats:
    """Statistics over tokens; norms are Euclidean, in the model's own units."""

    mean: Float[Tensor, " d_in"]
    """Mean activation, float32."""
    mean_norm: float
    """Mean of ||x||."""
    median_norm: float
    """Median of ||x||."""
    centred_norm: float
    """sqrt(mean ||x - mean||^2): the total standard deviation over all directions."""
    gamma: float
    """||mean|| / centred_norm: how far the cloud of activations lies from the origin, in units of its own size."""
    n_tokens: int
    """Tokens that these statistics are over."""


def moments(blocks: Iterable[Float[Tensor, "_ d_in"]]) -> ActivationStats:
    """Statistics over all tokens of all float32 blocks, each read once.

    Sums are over x - c, where c is the first block's mean: near the true mean, the variance loses no digits to a large
    offset. Within a block they are float32, across blocks float64. Source: Chan, Golub and LeVeque 1983, eq. 1.7.

    Raises:
        TextError: there are no tokens.
    """
    near: Tensor | None = None
    norms: list[Tensor] = []
    offset, squares = torch.zeros((), dtype=torch.float64), 0.0
    for acts in blocks:
        if near is None:
            if len(acts) == 0:
                continue
            near = acts.mean(0)
        shifted = acts - near
        offset = offset + shifted.sum(0).double()
        squares += float(torch.linalg.vector_norm(shifted, dim=1).double().square().sum())
        norms.append(torch.linalg.vector_norm(acts, dim=1))
    if near is None:
        raise TextError("there are no tokens to take statistics of; give more text")

    all_norms = torch.cat(norms)
    offset = offset / len(all_norms)
    mean = near.double() + offset
    centred_norm = math.sqrt(max(0.0, squares / len(all_norms) - float(offset.square().sum())))
    return ActivationStats(
        mean=mean.float(),
        mean_norm=float(all_norms.double().mean()),
        median_norm=float(all_norms.median()),
        centred_norm=centred_norm,
        gamma=float(mean.norm()) / centred_norm if centred_norm > 0 else math.inf,
        n_tokens=len(all_norms),
    )


def norm_limit(norms: Float[Tensor, " tokens"], *, outlier_factor: float) -> float:
    """Tokens of a larger norm are outliers: ``outlier_factor`` times the median norm.

    A few tokens of huge norm, attention sinks beyond BOS, would otherwise dominate every mean square.
    """
    return outlier_factor * float(norms.median())
