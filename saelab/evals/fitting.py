"""Small trainings inside an evaluation: the steps of `saelab train`, on rows in memory and without a directory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saelab.activations.moments import ActivationStats, moments
from saelab.activations.permutation import mixed_key, permuted
from saelab.errors import ConfigError
from saelab.sae.base import SAE, Metadata
from saelab.train.config import TrainConfig
from saelab.train.trainer import ActivationBatches, Trainer

Progress = Callable[[int, int, str], None]


class RowBatches:
    """Shuffled batches of rows in memory, endlessly: an epoch visits every row once. Batch ``step`` is a function of
    the step alone."""

    def __init__(self, rows: Float[Tensor, "rows d_in"], *, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= len(rows):
            raise ConfigError(
                f"batch_size must be between 1 and the {len(rows)} rows that there are, got {batch_size}; lower it"
            )
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed

    @property
    def d_in(self) -> int:
        return self.rows.shape[1]

    def at(self, step: int) -> Float[Tensor, "batch d_in"]:
        """The batch of ``step`` (from 0)."""
        epochs, index = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), len(self.rows))
        for epoch in np.unique(epochs):
            now = epochs == epoch
            index[now] = permuted(index[now], len(self.rows), mixed_key(self.seed, int(epoch)))
        return self.rows[torch.from_numpy(index)].float()

    def statistics(self, max_tokens: int | None = None) -> ActivationStats:
        """Statistics over the first ``max_tokens`` rows."""
        return moments(block.float() for block in self.rows[:max_tokens].split(8192))


def fit(
    config: TrainConfig,
    batches: ActivationBatches,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> SAE:
    """An SAE trained as ``config`` says, folded, so that it works on raw activations. Nothing is written.

    Raises:
        TrainingError: the loss stopped being a finite number.
    """
    trainer = Trainer(config, batches, device)
    while not trainer.finished:
        losses = trainer.advance(batches.at(trainer.step).to(device))
        if progress and (trainer.step % 50 == 0 or trainer.finished):
            progress(trainer.step, config.n_steps, f"loss {float(losses.total):.3f}")
    return trainer.finish(Metadata())
