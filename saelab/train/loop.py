"""Train sparse autoencoders on batches of activations: one alone, or several on one stream."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saelab import config as configs
from saelab import dist
from saelab.errors import ConfigError, Interrupted, TrainingError
from saelab.interrupts import deferred
from saelab.rundir import StageWriter
from saelab.sae.base import SAE, Metadata, SAELoss
from saelab.sae.io import save_sae
from saelab.train.config import TrainConfig
from saelab.train.end_to_end import OutputLoss
from saelab.train.nonfinite import NotFinite, dump_batch
from saelab.train.parallel import ALONE, Layout
from saelab.train.sinks import Sinks
from saelab.train.trainer import ActivationBatches, OutOfMemory, Trainer

Progress = Callable[[int, int, str], None]


class Job(NamedTuple):
    """An SAE to train: its settings, the stage directory to write, and what it shall remember of its data."""

    config: TrainConfig
    run: StageWriter
    metadata: Metadata
    output_loss: OutputLoss | None = None


def train_sae(
    config: TrainConfig,
    batches: ActivationBatches,
    run: StageWriter,
    *,
    metadata: Metadata,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    layout: Layout = ALONE,
    output_loss: OutputLoss | None = None,
) -> SAE:
    """Train, checkpoint and publish an SAE in the stage directory of ``run``; continues from its latest checkpoint.

    The result works on raw activations: centring and scaling are folded into it. An uninterrupted run and one that
    was killed and resumed end with the same bytes. With a ``layout`` of several processes each calls this with its part
    of the batches; where it holds a part of the features, that part is the result, but on the first process.
    ``output_loss`` is the model for ``config.end_to_end``.

    Raises:
        TrainingError: the loss or the gradient stopped being finite, or a step does not fit into memory.
        ConfigError: the run was begun with other settings.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    job = Job(config, run, metadata, output_loss)
    outcome = train_together([job], batches, resume=run.path, device=device, progress=progress, layout=layout)[0]
    if isinstance(outcome, TrainingError):
        raise outcome
    return outcome


def train_together(
    jobs: Sequence[Job],
    batches: ActivationBatches,
    *,
    resume: Path,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    layout: Layout = ALONE,
) -> list[SAE | TrainingError]:
    """Train several SAEs on one stream of batches; each ends with the bytes that training it alone gives.

    One that fails leaves the others alone: in its place stands the reason. ``resume`` is the directory that continues
    the work after Ctrl-C. Jobs may have come to different steps before.

    Raises:
        ConfigError: a run was begun with other settings.
        Interrupted: Ctrl-C or SIGTERM; checkpoints of the last whole step have been written.
    """
    sessions = [_Session(job, batches, device, layout) for job in jobs]
    n_steps = max(session.config.n_steps for session in sessions)
    with deferred() as stop:
        for step in range(min(session.trainer.step for session in sessions), n_steps):
            training = [session for session in sessions if session.trainer.step == step and not session.finished]
            if not training:  # one that had come less far failed before it caught up with the others
                continue
            acts = batches.at(step).to(device)
            for session in training:
                session.advance(acts, batches)
            # asked once: a request that comes after this line waits for the next step's checkpoint
            stopping = bool(layout.mesh.world.any(torch.tensor(bool(stop))))
            for session in training:
                session.checkpoint(stopping=stopping)
            if progress:
                progress(step + 1, n_steps, _detail(training))
            if stopping:
                for session in sessions:
                    session.sinks.close()
                again = layout.mesh.command(f"train --resume {resume}")
                raise Interrupted(f"stopped at step {step + 1} of {n_steps}; continue with: {again}")
    return [session.failure or session.publish(batches) for session in sessions]


def check_settings(path: Path, *, began: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Refuse to continue a run with settings other than those of its checkpoint.

    Raises:
        ConfigError: names the first setting that differs, with both values.
    """
    after = configs.flattened(now)
    for name, value in configs.flattened(began or {}).items():  # what is only in `after` is younger than the run
        if value != after.get(name):
            raise ConfigError(_differs(path, name, value, after.get(name)))


def check_asked(path: Path, *, began: dict[str, Any], asked: dict[str, Any]) -> None:
    """Refuse to continue a run when settings are asked for that it does not have.

    Raises:
        ConfigError: names the first of them, with both values.
    """
    before = configs.flattened(began)
    for name, value in configs.flattened(asked).items():
        if value != before.get(name):
            raise ConfigError(_differs(path, name, before.get(name), value))


def _differs(path: Path, name: str, began: Any, asked: Any) -> str:
    return (
        f"{path} was begun with {name} = {began!r}, but {name} = {asked!r} is asked for now; "
        "leave that out, or start anew with another --out"
    )


@runtime_checkable
class Positioned(Protocol):
    """Batches that know where in the store their tokens stand."""

    def positions(self, step: int) -> Int64[np.ndarray, " batch"]: ...


class _Session:
    """One job at work: its trainer, its checkpoints, its log."""

    def __init__(self, job: Job, batches: ActivationBatches, device: str | torch.device, layout: Layout) -> None:
        self.config, self.run, self.metadata = job.config, job.run, job.metadata
        self.mesh = layout.mesh
        self.trainer = Trainer(job.config, batches, device, layout, job.output_loss)
        self.checkpoints = layout.checkpoints(job.run.path / "checkpoints", keep_every=job.config.keep_every)
        self.settings = configs.to_mapping(job.config)
        saved = self.checkpoints.latest()
        if saved:
            check_settings(job.run.path, began=saved.state.get("config"), now=self.settings)
            self.trainer.restore(saved)
        job.run.rewind_metrics(self.trainer.step)
        self.sinks = Sinks(job.run, job.config.log_to if self.mesh.is_first else (), self.settings)
        self.loss = float("nan")
        self.failure: TrainingError | None = None
        self._batches = batches
        self._start_clock()

    @property
    def finished(self) -> bool:
        return self.trainer.finished or self.failure is not None

    def advance(self, acts: Float[Tensor, "batch *slots d_in"], batches: ActivationBatches) -> None:
        """One step, and its line in the log when that is due; what went wrong becomes ``failure``."""
        step = self.trainer.step
        try:
            losses = self.trainer.advance(acts)
        except NotFinite as error:
            self._fail(TrainingError(f"{error}; the batch is in {self._dump(step, acts, batches)}"))
        except OutOfMemory as error:
            if step not in self.checkpoints.steps():
                self._save()
            self._fail(TrainingError(f"{error}; a checkpoint of step {step} is kept"))
        else:
            self.loss = float(losses.total)
            if self.trainer.step % self.config.log_every == 0 or self.finished:
                self._log(losses)

    def checkpoint(self, *, stopping: bool) -> None:
        if self.failure is None and (stopping or self.trainer.step % self.config.checkpoint_every == 0):
            self._save()

    def publish(self, batches: ActivationBatches) -> SAE:
        """Write the SAE, and DONE."""
        self.sinks.close()
        self.trainer.use_average_()
        density = self.trainer.density(batches)
        sae = self.trainer.finish(self.metadata)
        dist.on_first(self.mesh, lambda: self._write(sae, density))
        return sae

    def _write(self, sae: SAE, density: Float[Tensor, " d_sae"]) -> None:
        save_sae(sae, self.run.path, density=density)
        self.run.finish()

    def _dump(self, step: int, acts: Float[Tensor, "batch *slots d_in"], batches: ActivationBatches) -> Path:
        """Keep the batch of all processes; returns the file on the first, its directory elsewhere."""
        acts = torch.cat(self.mesh.data.gather(acts))
        positions = None
        if isinstance(batches, Positioned):
            mine = torch.from_numpy(batches.positions(step))
            positions = torch.cat(self.mesh.data.gather(mine)).numpy()
        return dist.on_first(self.mesh, lambda: dump_batch(self.run.path, step, acts, positions)) or self.run.path

    def _save(self) -> None:
        self.run.flush_metrics()  # a power cut must not leave a checkpoint without the lines before it
        self.checkpoints.save(self.trainer.step, self.trainer.tensors(), {"config": self.settings})

    def _fail(self, error: TrainingError) -> None:
        self.failure = error
        self.sinks.close()

    def _log(self, losses: SAELoss) -> None:
        elapsed, n_steps = time.perf_counter() - self._clock, self.trainer.step - self._clock_step
        timing = {
            "tokens_per_second": round(n_steps * self.config.batch_size / elapsed),
            "stall_share": round((self._stalled_s - self._stalled_before) / elapsed, 4),
        }
        self.sinks.write(self.trainer.record(losses) | timing)
        self._start_clock()

    def _start_clock(self) -> None:
        self._clock, self._clock_step, self._stalled_before = time.perf_counter(), self.trainer.step, self._stalled_s

    @property
    def _stalled_s(self) -> float:
        """Seconds that training has waited for data, where the batches count them."""
        return float(getattr(self._batches, "stall_s", 0.0))


def _detail(sessions: Sequence[_Session]) -> str:
    losses = [session.loss for session in sessions]
    return f"loss {losses[0]:.3f}" if len(losses) == 1 else f"loss {min(losses):.3f} to {max(losses):.3f}"
