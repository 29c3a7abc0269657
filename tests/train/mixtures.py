"""Activations for the tests of several processes: a known dictionary, in the default precision."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activations.loader import ActivationStats
from saelab.train.config import TrainConfig
from saelab.train.optim import OptimConfig

D_IN, N_TRUE, BATCH = 16, 24, 64


class Mixtures:
    """Each token is two of 24 directions, plus an offset; ``poison_at``: the batch whose last token is no number."""

    d_in = D_IN

    def __init__(self, *, poison_at: int | None = None, batch: int = BATCH) -> None:
        generator = torch.Generator().manual_seed(0)
        self.directions = torch.nn.functional.normalize(torch.randn(N_TRUE, D_IN, generator=generator), dim=1)
        self.offset = torch.randn(D_IN, generator=generator)
        self.poison_at = poison_at
        self.batch = batch

    def at(self, step: int) -> Float[Tensor, "batch d_in"]:
        generator = torch.Generator().manual_seed(1000 + step)
        chosen = torch.rand(self.batch, N_TRUE, generator=generator).topk(2).indices
        size = 1 + torch.rand(self.batch, 2, generator=generator)
        acts = (size[..., None] * self.directions[chosen]).sum(1) + self.offset
        if step == self.poison_at:
            acts[-1, 0] = math.nan
        return acts

    def statistics(self, max_tokens: int) -> ActivationStats:
        acts = torch.cat([self.at(10**6 + i) for i in range(4)])
        centred = acts - acts.mean(0)
        return ActivationStats(
            mean=acts.mean(0),
            mean_norm=float(acts.norm(dim=1).mean()),
            centred_norm=float(centred.pow(2).sum(1).mean().sqrt()),
            median_norm=float(acts.norm(dim=1).median()),
            n_tokens=len(acts),
            gamma=float(acts.mean(0).norm() / centred.std(0).norm()),
        )


class Pairs(Mixtures):
    """Two vectors for each token: a mixture, and the same in another basis."""

    def at(self, step: int) -> Float[Tensor, "batch 2 d_in"]:
        acts = super().at(step)
        return torch.stack([acts, acts.roll(3, dims=1) * 2], dim=1)

    def statistics(self, max_tokens: int) -> tuple[ActivationStats, ...]:  # type: ignore[override]
        first = Mixtures().statistics(max_tokens)
        second = replace(first, mean=first.mean.roll(3) * 2, centred_norm=first.centred_norm * 2)
        return first, second


def config_of(sae: object, *, n_steps: int = 40, **changes: object) -> TrainConfig:
    """Short training in which features die early, so that AuxK has work, and the gradient is clipped."""
    settings: dict = {
        "tokens": BATCH * n_steps,
        "batch_size": BATCH,
        "optim": OptimConfig(lr=5e-3, clip_norm=0.05),
        "stats_tokens": 256,
        "dead_after_tokens": 300,
        "checkpoint_every": 10,
        "log_every": 5,
    }
    return TrainConfig(sae=sae, **(settings | changes))  # type: ignore[arg-type]
