"""Structure among the features: a meta-SAE learns to write each decoder direction as a sum of a few shared ones.

The more of the directions' variance it explains, the more of their structure the features share; lower is better.
Sources: Bussmann et al. 2024, "Showing SAE latents are not atomic using meta-SAEs"; the sizes are those of SAEBench's
meta_structure (BatchTopK of a quarter of the width, 4 active, 1,500 steps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from saelab.errors import ConfigError
from saelab.evals.fitting import RowBatches, fit
from saelab.evals.piece import Piece, Score
from saelab.evals.reconstruction import explained, variance_sums
from saelab.sae.base import SAE
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.stats import bootstrap
from saelab.train.config import TrainConfig
from saelab.train.optim import OptimConfig

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """The meta-SAE."""

    width_share: float = 0.25
    """Its features as a share of the SAE's."""
    k: int = 4
    """Shared directions that a feature is written with, on average."""
    steps: int = 1500
    """Training steps, of ``batch_size`` features."""
    batch_size: int = 512
    """Features in a step, at most all."""
    lr: float = 1e-3
    """Peak learning rate."""

    def __post_init__(self) -> None:
        if not 0 < self.width_share <= 1:
            raise ConfigError(f"meta.width_share must be above 0 and at most 1, got {self.width_share}; 0.25 is usual")
        for name in ("k", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"meta.{name} must be at least 1, got {getattr(self, name)}; raise it")


def meta_structure(
    sae: SAE,
    live: Bool[Tensor, " d_sae"],
    config: MetaConfig,
    *,
    draws: int,
    seed: int,
    progress: Progress | None = None,
) -> Piece:
    """Variance of the ``live`` features' unit directions that a meta-SAE explains; features are resampled."""
    directions = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu()[live.cpu()], dim=1)
    width = round(config.width_share * len(directions))
    if width < config.k:
        return Piece(
            name="meta",
            skipped=f"{len(directions)} live features are too few: a meta-SAE of {width} features cannot keep "
            f"{config.k} (meta.k)",
        )
    batch_size = min(config.batch_size, len(directions))
    settings = TrainConfig(
        sae=BatchTopKConfig(d_sae=width, k=config.k),
        tokens=config.steps * batch_size,
        batch_size=batch_size,
        optim=OptimConfig(lr=config.lr),
        outlier_factor=None,
        seed=seed,
    )
    meta = fit(settings, RowBatches(directions, batch_size=batch_size, seed=seed), progress=progress)
    with torch.inference_mode():
        error = (directions - meta(directions)).pow(2).sum(1)
    sums = variance_sums(directions[:, None], error[:, None], torch.ones(len(directions), 1))
    interval = bootstrap(explained, sums.numpy(), draws=draws, seed=seed)
    note = (
        f"A BatchTopK meta-SAE of {width:,} features, {config.k} active, {config.steps:,} steps, "
        f"on {len(directions):,} live features."
    )
    score = Score("meta_explained_variance", "", interval, len(directions), "features")
    return Piece(name="meta", scores=(score,), notes=(note,))
