"""Train sparse autoencoders on batches of activations: one alone, or several on one stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab import config as configs
from saelab.checkpoint import Checkpoints
from saelab.errors import Interrupted
from saelab.interrupts import deferred
from saelab.rundir import StageWriter
from saelab.sae.base import SAE, Metadata, SAELoss
from saelab.sae.io import save_sae
from saelab.train.config import TrainConfig
from saelab.train.sinks import Sinks
from saelab.train.trainer import ActivationBatches, Trainer

Progress = Callable[[int, int, str], None]


class Job(NamedTuple):
    """An SAE to train: its settings, the stage directory to write, and what it shall remember of its data."""

    config: TrainConfig
    run: StageWriter
    metadata: Metadata


def train_sae(
    config: TrainConfig,
    batches: ActivationBatches,
    run: StageWriter,
    *,
    metadata: Metadata,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> SAE:
    """Train, checkpoint and publish an SAE in the stage directory of ``run``; continues from its latest checkpoint.

    The result works on raw activations: centring and scaling are folded into it. An uninterrupted run and one that
    was killed and resumed end with the same bytes.

    Raises:
        TrainingError: the loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    job = Job(config, run, metadata)
    return train_together([job], batches, resume=run.path, device=device, progress=progress)[0]


def train_together(
    jobs: Sequence[Job],
    batches: ActivationBatches,
    *,
    resume: Path,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> list[SAE]:
    """Train several SAEs on one stream of batches; each ends with the bytes that training it alone gives.

    ``resume`` is the directory that continues the work after Ctrl-C. Jobs may have come to different steps before.

    Raises:
        TrainingError: a loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; checkpoints of the last whole step have been written.
    """
    sessions = [_Session(job, batches, device) for job in jobs]
    n_steps = max(session.config.n_steps for session in sessions)
    with deferred() as stop:
        for step in range(min(session.trainer.step for session in sessions), n_steps):
            acts = batches.at(step).to(device)
            training = [session for session in sessions if session.trainer.step == step and not session.finished]
            for session in training:
                session.advance(acts)
            # asked once: a request that comes after this line waits for the next step's checkpoint
            stopping = bool(stop)
            for session in training:
                session.checkpoint(stopping=stopping)
            if progress:
                progress(step + 1, n_steps, _detail(training))
            if stopping:
                for session in sessions:
                    session.sinks.close()
                raise Interrupted(
                    f"stopped at step {step + 1} of {n_steps}; continue with: saelab train --resume {resume}"
                )
    return [session.publish(batches) for session in sessions]


class _Session:
    """One job at work: its trainer, its checkpoints, its log."""

    def __init__(self, job: Job, batches: ActivationBatches, device: str | torch.device) -> None:
        self.config, self.run, self.metadata = job
        self.trainer = Trainer(job.config, batches, device)
        self.checkpoints = Checkpoints(job.run.path / "checkpoints", keep_every=job.config.keep_every)
        saved = self.checkpoints.latest()
        if saved:
            self.trainer.restore(saved)
        job.run.rewind_metrics(self.trainer.step)
        self.sinks = Sinks(job.run, job.config.log_to, configs.to_mapping(job.config))
        self.loss = float("nan")
        self._clock, self._clock_step = time.perf_counter(), self.trainer.step

    @property
    def finished(self) -> bool:
        return self.trainer.finished

    def advance(self, acts: Float[Tensor, "batch *slots d_in"]) -> None:
        """One step, and its line in the log when that is due."""
        losses = self.trainer.advance(acts)
        self.loss = float(losses.total)
        if self.trainer.step % self.config.log_every == 0 or self.finished:
            self._log(losses)

    def checkpoint(self, *, stopping: bool) -> None:
        if stopping or self.trainer.step % self.config.checkpoint_every == 0:
            self.checkpoints.save(self.trainer.step, self.trainer.tensors(), {})

    def publish(self, batches: ActivationBatches) -> SAE:
        """Write the SAE, and DONE."""
        self.sinks.close()
        density = self.trainer.density(batches)
        sae = self.trainer.finish(self.metadata)
        save_sae(sae, self.run.path, density=density)
        self.run.finish()
        return sae

    def _log(self, losses: SAELoss) -> None:
        elapsed, n_steps = time.perf_counter() - self._clock, self.trainer.step - self._clock_step
        speed = round(n_steps * self.config.batch_size / elapsed)
        self.sinks.write(self.trainer.record(losses) | {"tokens_per_second": speed})
        self._clock, self._clock_step = time.perf_counter(), self.trainer.step


def _detail(sessions: Sequence[_Session]) -> str:
    losses = [session.loss for session in sessions]
    return f"loss {losses[0]:.3f}" if len(losses) == 1 else f"loss {min(losses):.3f} to {max(losses):.3f}"


def memory_bytes(config: TrainConfig, d_in: int) -> int:
    """What weights, gradients and Adam's two moments take in float32."""
    n_parameters = 2 * d_in * config.sae.d_sae + d_in + config.sae.d_sae
    return 16 * n_parameters
