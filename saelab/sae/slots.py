"""What architectures with slots share: folding a mean and a scale for each."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from saelab.errors import ConfigError


def checked_scales(scale: float | Float[Tensor, " slots"], n_slots: int) -> tuple[float, ...]:
    """One scale for each slot.

    Raises:
        ConfigError: not so many, or one that is no positive number.
    """
    scales = tuple(torch.as_tensor(scale, dtype=torch.float64).flatten().tolist())
    if len(scales) != n_slots:
        raise ConfigError(f"there are {len(scales)} scales to fold, but {n_slots} slots; give one for each")
    if not all(0 < one < float("inf") for one in scales):
        raise ConfigError(f"the scales to fold must be positive numbers, got {scales}; were they estimated on zeros?")
    return scales


def product64(rows: Float[Tensor, "n d_in"], vector: Float[Tensor, " d_in"]) -> Float64[Tensor, " n"]:
    """``rows @ vector`` in float64, without a copy of all rows in it."""
    return torch.cat([some.double() @ vector.double() for some in rows.split(4096)])
