"""The least time that an operation can take on a device, from its bytes and flops and the device's measured ceilings.

A floor is a sum of terms, each in milliseconds and none overlapping another. On a GPU it cannot be beaten but by
overlap; on a CPU rows that stay in a cache move faster than the copy that is measured, so small terms can fall below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.shapes import Shape
from benchmarks.timing import timer

#: One product of at most this many entries is enough to learn the rate of larger ones, and fits everywhere.
_LARGEST_PRODUCT = 2**29


class Ceilings(NamedTuple):
    """What the device reaches in the two things that everything here is made of."""

    copy_bytes: float
    """Bytes a second, read and written together, of a copy far larger than any cache."""
    bfloat16_flops: float
    """Flops a second of the encoder's product at a shape, in bfloat16."""
    float32_flops: float
    """The same in float32 (without TF32)."""

    @property
    def flops(self) -> float:
        """Of the faster of the two precisions."""
        return max(self.bfloat16_flops, self.float32_flops)

    @property
    def faster(self) -> str:
        return "bfloat16" if self.bfloat16_flops > self.float32_flops else "float32"


class Floor(NamedTuple):
    """Milliseconds of each term."""

    terms: dict[str, float]

    @property
    def ms(self) -> float:
        return sum(self.terms.values())

    def __add__(self, other: object) -> Floor:
        if not isinstance(other, Floor):
            return NotImplemented
        names = {**self.terms, **other.terms}
        return Floor({name: self.terms.get(name, 0.0) + other.terms.get(name, 0.0) for name in names})


def measured_ceilings(shape: Shape, device: str, *, smoke: bool = False, repeats: int = 7) -> Ceilings:
    """Copy bandwidth of the device and its rate at the product of ``shape``: the best of some runs, as a ceiling is."""
    n_bytes = 2**22 if smoke else 2**28
    source = torch.ones(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy_s = _least_seconds(lambda: target.copy_(source), device, repeats)
    del source, target
    features = min(shape.features, max(1, _LARGEST_PRODUCT // shape.tokens))
    rates = {}
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.ones(shape.tokens, shape.width, device=device, dtype=dtype)
        W = torch.ones(features, shape.width, device=device, dtype=dtype)
        seconds = _least_seconds(functools.partial(torch.matmul, x, W.T), device, repeats)
        rates[dtype] = 2 * shape.tokens * features * shape.width / seconds
    return Ceilings(2 * n_bytes / copy_s, rates[torch.bfloat16], rates[torch.float32])


def _least_seconds(run: Callable[[], object], device: str, repeats: int) -> float:
    clock = timer(run, device)
    clock()
    return min(clock() for _ in range(repeats))


class Floors:
    """The floors of every operation at one shape on one device. Letters: N tokens, d width, F features, k active."""

    def __init__(self, shape: Shape, ceilings: Ceilings, *, weight_bytes: int) -> None:
        """``weight_bytes``: 4 for float32 weights, 2 for bfloat16."""
        self.shape, self.ceilings, self.weight_bytes = shape, ceilings, weight_bytes

    def encode(self) -> Floor:
        """The product: 2 N d F flops, or reading x and W once where that is more. What follows it is not counted."""
        n, d, f, _ = self.shape
        product = 2 * n * d * f / self.ceilings.flops
        return Floor({"encoder product": 1e3 * max(product, self._copy_s((n + f) * d * self.weight_bytes))})

    def gather(self, name: str) -> Floor:
        """One row of width d for each of the N k pairs."""
        n, d, _, k = self.shape
        return Floor({name: self._copy_ms(n * k * d * self.weight_bytes)})

    def decode(self) -> Floor:
        """The rows of W_dec, and y [N, d] written in float32."""
        return self.gather("rows of W_dec") + Floor({"output": self._copy_ms(4 * self.shape.tokens * self.shape.width)})

    def tokens_ms(self) -> float:
        """Reading N rows of width d once."""
        return self._copy_ms(self.weight_bytes * self.shape.tokens * self.shape.width)

    def logps(self, n_tokens: int, n_vocabulary: int, *, n_products: int) -> Floor:
        """So many products of N x d x V: one forward; backward the logits again and one for each gradient."""
        flops = n_products * 2 * n_tokens * self.shape.width * n_vocabulary
        return Floor({"products": 1e3 * flops / self.ceilings.flops})

    def pairs(self) -> Floor:
        """Four radix passes, each reading and writing N k keys of 8 bytes."""
        return Floor({"sort": self._copy_ms(self.shape.tokens * self.shape.k * 8 * 2 * 4)})

    def feature_grad(self) -> Floor:
        """One gathered row a pair, and the gradient [F, d] written in float32."""
        return self.gather("rows of tokens") + Floor(
            {"gradient": self._copy_ms(4 * self.shape.features * self.shape.width)}
        )

    def feature_step(self) -> Floor:
        """Both weights' gathered rows; then 26 bytes a weight: p, m, v read and written in float32, a bfloat16 copy."""
        weights = 2 * self.shape.features * self.shape.width
        rows = self.gather("rows of tokens").terms["rows of tokens"]
        return Floor({"rows of tokens": 2 * rows, "Adam": self._copy_ms(26 * weights)})

    def aux_dead(self) -> Floor:
        """Five products of N x d x n_dead: two forward, three backward."""
        n, d, *_ = self.shape
        return Floor({"AuxK products": 1e3 * 5 * 2 * n * d * self.shape.n_dead / self.ceilings.flops})

    def whole_step(self) -> Floor:
        """Encoding, one gather of W_dec, sort, both gradients with Adam, AuxK."""
        return self.encode() + self.gather("rows of W_dec") + self.pairs() + self.feature_step() + self.aux_dead()

    def _copy_s(self, n_bytes: float) -> float:
        return n_bytes / self.ceilings.copy_bytes

    def _copy_ms(self, n_bytes: float) -> float:
        return 1e3 * self._copy_s(n_bytes)
