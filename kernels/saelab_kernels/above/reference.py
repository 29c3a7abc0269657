"""Definition: every pre-activation, then those above the floor."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from saelab_kernels.ragged import Ragged


def encode_above(x: Tensor, W: Tensor, b: Tensor, floor: Tensor) -> Ragged:
    """x [N, d], W [F, d], b [F], floor [F] -> the pre-activations above their feature's floor; NaN counts as above."""
    return above(F.linear(x, W, b), floor)


def above(pre_acts: Tensor, floor: Tensor) -> Ragged:
    """The entries of ``pre_acts`` [N, F] that are not at or below ``floor`` [F]."""
    chosen = ~(pre_acts <= floor)
    tokens, features = chosen.nonzero(as_tuple=True)
    offsets = tokens.new_zeros(len(pre_acts) + 1)
    offsets[1:] = chosen.sum(1).cumsum(0)
    return Ragged(pre_acts[tokens, features], features, offsets)
