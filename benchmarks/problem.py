"""One training problem that all contenders are given: initial weights, batches, dead features, optimiser settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.data import planted, read_bits, save_bits
from benchmarks.shapes import Shape

AUX_COEFFICIENT = 1 / 32
CLIP_NORM = 1.0
BETAS = (0.9, 0.999)
#: Adam divides by the root mean square of the gradient plus this.
EPS = 1e-8


@dataclass(frozen=True)
class Problem:
    """Everything that decides what a step computes."""

    shape: Shape
    directions: Tensor  # float32 [F, d], unit rows: initial W_dec, and the encoder tied to it
    b_enc: Tensor  # float32 [F]
    batches: Tensor  # bfloat16 [n_batches, N, d]
    held_out: Tensor  # bfloat16 [M, d]
    dead: Tensor  # bool [F]
    lr: float
    device: str

    def batch(self, index: int) -> Tensor:
        """float32 [N, d] on the device; the batches repeat."""
        return self.batches[index % len(self.batches)].to(self.device).float()

    def save(self, directory: Path) -> dict[str, object]:
        """Write the tensors for another process, and return what it needs to read them."""
        np.save(directory / "directions.npy", self.directions.numpy())
        np.save(directory / "b_enc.npy", self.b_enc.numpy())
        np.save(directory / "dead.npy", self.dead.numpy())
        save_bits(self.batches, directory / "batches.npy")
        save_bits(self.held_out, directory / "held_out.npy")
        return {"directory": str(directory), "shape": list(self.shape), "lr": self.lr, "device": self.device}

    @classmethod
    def load(cls, directory: Path | str, *, shape: list[int], lr: float, device: str) -> Problem:
        """What ``save`` wrote."""
        directory = Path(directory)
        directions, b_enc, dead = (
            torch.from_numpy(np.load(directory / f"{name}.npy")) for name in ("directions", "b_enc", "dead")
        )
        batches, held_out = (read_bits(directory / f"{name}.npy") for name in ("batches", "held_out"))
        return cls(Shape(*shape), directions, b_enc, batches, held_out, dead, lr, device)

    def without_dead(self) -> Problem:
        """The same problem with every feature counted as alive."""
        return dataclasses.replace(self, dead=torch.zeros_like(self.dead))


def planted_problem(shape: Shape, device: str, *, n_batches: int = 4, n_held_out: int = 1024, seed: int = 0) -> Problem:
    """Tokens from a planted dictionary; every twentieth feature is dead: counted as such, and biased never to fire."""
    width, features = shape.width, shape.features
    dead = torch.arange(features) % 20 == 0
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(features, width, generator=generator), dim=1)
    tokens = planted(
        n_batches * shape.tokens + n_held_out, width, n_directions=max(64, 2 * width), active=16, seed=seed
    ).to(torch.bfloat16)
    # pre-activations of a random unit row have about unit variance: at -2 a feature is hardly ever among the k largest,
    # while 2 % of its pre-activations are still positive, as for features that died in training
    return Problem(
        shape=shape,
        directions=directions,
        b_enc=torch.where(dead, -2.0, 0.0),
        batches=tokens[: n_batches * shape.tokens].view(n_batches, shape.tokens, width),
        held_out=tokens[n_batches * shape.tokens :],
        dead=dead,
        lr=1e-3,
        device=device,
    )
