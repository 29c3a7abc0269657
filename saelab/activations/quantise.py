"""Activations in one byte a number: a scale for each token, and values in units of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

#: The dtypes that are stored with scales, and the largest magnitude that a stored value has.
#: int8 leaves out -128, so that a vector and its negative are stored alike.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class Quantised(NamedTuple):
    """Vectors as they are stored: ``values * scale``."""

    values: Shaped[Tensor, "*tokens d_in"]
    scale: Float32[Tensor, " *tokens"]


def quantised(acts: Float[Tensor, "*tokens d_in"], dtype: torch.dtype) -> Quantised:
    """``acts`` (finite) in int8 or float8_e4m3fn. A token's scale makes its largest number the largest that there is.

    Bounds, with m the largest magnitude of the token: int8 rounds each number to a multiple of m / 127, so it is off
    by at most m / 254, whatever its size. float8_e4m3fn has 3 bits behind the leading one, so a number is off by at
    most 1/16 of itself, or by m / 448 / 1024 where it is too small for that (below m / 448 / 64).
    """
    acts = acts.float()
    largest = LARGEST[dtype]
    scale = acts.abs().amax(-1) / largest
    units = acts / torch.where(scale > 0, scale, 1)[..., None]  # a token of zeros has scale 0
    if dtype == torch.int8:
        units = units.round()
    return Quantised(units.clamp(-largest, largest).to(dtype), scale)


def dequantised(
    values: Shaped[Tensor, "*tokens d_in"], scale: Float32[Tensor, " *tokens"]
) -> Float32[Tensor, "*tokens d_in"]:
    """The vectors that ``quantised`` rounded to, in float32."""
    return values.float() * scale[..., None]
