"""A shuffle that is a formula: the place of any one token in the shuffled order, without a table and without state."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int64, UInt64

_ROUNDS = 6


def permuted(index: Int64[np.ndarray, " batch"], n: int, key: int) -> Int64[np.ndarray, " batch"]:
    """Where a keyed permutation of range(n) sends each ``index`` (all of them in range(n)).

    A generalised Feistel network on pairs (left, right), left < a, right < b, where a * b is n or little more: each
    round adds a hash of one half to the other, which can be undone whatever the hash, so pairs are permuted. A result
    beyond n is sent on ("cycle walking") until it falls inside, for about one index in sqrt(n).
    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sections 3 and 5.
    """
    a = max(1, math.isqrt(n - 1) + 1)
    b = -(-n // a)
    out = _network(index, a, b, key)
    while (outside := out >= n).any():
        out[outside] = _network(out[outside], a, b, key)
    return out


def mixed_key(*parts: int) -> int:
    """One 64-bit key that depends on all of ``parts``, such as a seed and an epoch."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _hash(key + np.array([part % 2**64], np.uint64))
    return int(key[0])


def _network(index: Int64[np.ndarray, " batch"], a: int, b: int, key: int) -> Int64[np.ndarray, " batch"]:
    left, right = np.divmod(index.astype(np.uint64), np.uint64(b))
    sizes = np.uint64(a), np.uint64(b)
    for round_ in range(_ROUNDS):
        round_key = np.uint64(mixed_key(key, round_))
        if round_ % 2 == 0:
            left = (left + _hash(right ^ round_key) % sizes[0]) % sizes[0]
        else:
            right = (right + _hash(left ^ round_key) % sizes[1]) % sizes[1]
    return (left * sizes[1] + right).astype(np.int64)


def _hash(x: UInt64[np.ndarray, " batch"]) -> UInt64[np.ndarray, " batch"]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): each bit of the result depends on all bits of ``x``."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
