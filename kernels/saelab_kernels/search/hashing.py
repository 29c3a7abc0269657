"""A fixed pseudo-random number of each (seed, feature, position): the mixer of SplitMix64 (Steele et al. 2014).

A sample of the smallest hashes is uniform, and depends on nothing but what it samples: not on order, chunks or shards.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)

#: The bits of a hash that a sample is drawn by; two are left out so that minus the hash is an int64 above ``nothing``.
PRIORITY_BITS = 62


def hash64(seed: int, features: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The hash of each (feature, position), uint64: the mixer applied to seed, feature and position in turn."""
    return mixed(feature_hashes(seed, features) ^ positions.astype(np.uint64))


def feature_hashes(seed: int, features: np.ndarray) -> np.ndarray:
    """What a position is yet to be mixed into, uint64."""
    return mixed(mixed(np.array([seed % 2**64], np.uint64) + np.uint64(_GOLDEN)) ^ features.astype(np.uint64))


def mixed(z: np.ndarray) -> np.ndarray:
    """SplitMix64's mixer of uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FACTORS[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return z ^ (z >> np.uint64(31))


def priorities(feature_hash: Tensor, positions: Tensor) -> Tensor:
    """Minus the leading 62 bits of the hash, so that the highest priorities are the smallest hashes; int64.

    ``feature_hash``: the bits of ``feature_hashes`` as int64. Tensors of one shape.
    """
    z = feature_hash ^ positions
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        z = (z ^ _shifted(z, shift)) * (factor - 2**64)  # int64 arithmetic wraps around, as uint64 does
    return -_shifted(z ^ _shifted(z, 31), 64 - PRIORITY_BITS)


def feature_hash_bits(seed: int, n_features: int, device: torch.device) -> Tensor:
    """``feature_hashes`` of all features as int64 [F] on ``device``."""
    hashes = feature_hashes(seed, np.arange(n_features))
    return torch.from_numpy(hashes.view(np.int64)).to(device)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """The bits of an int64 moved down, zeros moving in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
