"""What surrounds the steps of every trainer: optimiser, log, checkpoints, resume, and a stop that loses nothing.

A trainer's loop reads

    for step in session.steps():
        for part in order.parts(step):
            session.backward(loss(part))
        session.update()
        session.log(...)

and everything that a step changes is in the checkpoint: the trained parameters, Adam's moments, and what the trainer
registers besides. Data and random numbers are functions of the step, so they need no state. Under torchrun every
process does the same with its share of the records, and the first writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saelab import dist, schedules
from saelab.activations.permutation import mixed_key, permuted
from saelab.adam import restore_state_, state_tensors
from saelab.align.parallel import (
    by_placement,
    check_shares,
    clip_gradients_,
    placed_like,
    sum_gradients_,
    whole,
)
from saelab.checkpoint import Checkpoints
from saelab.errors import ConfigError, Interrupted, TrainingError
from saelab.interrupts import deferred
from saelab.rundir import StageWriter

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    lr: float = 5e-5
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the gradient's mean and square."""
    weight_decay: float = 0.0
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    warmup_share: float = 0.1
    """Share of the steps over which the learning rate rises from 0."""
    decay_share: float = 0.9
    """Share of the steps, at the end, over which it falls to 0."""
    clip_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it."""

    def __post_init__(self) -> None:
        if not 0 < self.lr < 1:
            raise ConfigError(f"optim.lr must be between 0 and 1, got {self.lr}; 1e-5 to 1e-3 are usual")
        for name in ("warmup_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"optim.{name} is a share of the steps, got {getattr(self, name)}; lower it")
        if not self.clip_norm > 0:
            raise ConfigError(f"optim.clip_norm must be above 0, got {self.clip_norm}; 1 is usual")


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How long to train, on how much at a time."""

    steps: int = 100
    """Updates of the weights."""
    batch_size: int = 8
    """Records (pairs, prompts or demonstrations) in a step."""
    micro_batch: int | None = None
    """Records in a forward pass; gradients add up to those of the whole batch. Off: all at once."""
    shard: bool = False
    """Under torchrun, where all weights are trained: spread layers and Adam's state over the processes (FSDP2)."""
    seed: int = 0
    """Seed of the order of the records and of sampling."""
    optim: AdamWSettings = field(default_factory=AdamWSettings)
    """AdamW and its learning rate."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 50
    """Steps between two checkpoints."""
    keep_every: int | None = None
    """Checkpoints of steps divisible by this stay, to compare the model over its training; the last two always do."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "log_every", "checkpoint_every", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}; raise it")


class Order:
    """Which records a step sees: each epoch all of them once, in an order made from the seed and the epoch's number."""

    def __init__(
        self,
        n_records: int,
        *,
        batch_size: int,
        micro_batch: int | None,
        seed: int,
        group: dist.Group = dist.ALONE,
    ) -> None:
        if n_records < 1:
            raise ConfigError("there are no records to train on; give more data")
        self.n_records = n_records
        self.batch_size = batch_size
        self.micro_batch = micro_batch or batch_size
        self.seed = seed
        self.group = group

    def batch(self, step: int) -> Int[np.ndarray, " batch"]:
        """The records of ``step``, counted from 0, of all processes."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, index = np.divmod(places, self.n_records)
        chosen = np.empty_like(index)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            chosen[now] = permuted(index[now], self.n_records, mixed_key(self.seed, int(epoch)))
        return chosen

    def parts(self, step: int) -> list[Int[np.ndarray, " part"]]:
        """This process's share of them in pieces for one forward pass each."""
        batch = self.batch(step)[self.group.rank :: self.group.size]
        return [batch[i : i + self.micro_batch] for i in range(0, len(batch), self.micro_batch)]


@runtime_checkable
class Stateful(Protocol):
    """Something that steps change besides the parameters."""

    def tensors(self) -> dict[str, Tensor]: ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None: ...


class Session:
    """One training run at work, on one process or on all of ``mesh``.

    Raises:
        ConfigError: nothing is to be trained, or a batch cannot be shared among the processes.
    """

    def __init__(
        self,
        run: StageWriter,
        settings: StepSettings,
        parameters: Mapping[str, nn.Parameter],
        *,
        mesh: dist.Mesh = dist.ONE_PROCESS,
        progress: Progress | None = None,
        **state: Stateful,
    ) -> None:
        if not parameters:
            raise ConfigError("no parameter is trainable; choose an adapter or train all weights")
        check_shares(settings.batch_size, mesh, sharded=settings.shard)
        self.mesh = mesh
        self.run = run
        self.settings = settings
        self.parameters = dict(parameters)
        self.state = state
        self.progress = progress
        self.optimizer = torch.optim.AdamW(
            [{"params": group} for group in by_placement(self.parameters.values())],
            lr=1.0,
            betas=settings.optim.betas,
            weight_decay=settings.optim.weight_decay,
            fused=True,
        )
        self.checkpoints = Checkpoints(run.path / "checkpoints", keep_every=settings.keep_every)
        self.step = 0
        self.grad_norm = self.lr = 0.0
        self._detail = ""
        self._restore()

    def steps(self) -> Iterator[int]:
        """The steps still to do, from 0 or from where the last checkpoint ends. After each, what is due is done.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
        """
        if self.mesh.is_first:
            self.run.rewind_metrics(self.step)
        with deferred() as stop:
            while self.step < self.settings.steps:
                yield self.step
                self.step += 1
                stopping = bool(self.mesh.world.any(torch.tensor(bool(stop))))
                if stopping or self.step % self.settings.checkpoint_every == 0 or self.step == self.settings.steps:
                    self._checkpoint()
                if self.progress:
                    self.progress(self.step, self.settings.steps, self._detail)
                if stopping:
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.settings.steps}; "
                        f"continue with: {self.mesh.command(f'align resume {self.run.path}')}"
                    )

    def backward(self, loss: Float[Tensor, ""]) -> None:
        """Add the gradient of ``loss``, a part of the step's mean.

        Raises:
            TrainingError: it is not a finite number; no weight has changed.
        """
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {float(loss.detach())} at step {self.step}; lower optim.lr, or look at the records "
                "of the step; the last checkpoint is untouched"
            )
        loss.backward()

    def update(self) -> None:
        """Add up the processes' gradients, clip them, take one step of AdamW, forget them."""
        optim = self.settings.optim
        n_steps = self.settings.steps
        self.lr = optim.lr * schedules.warmup_then_decay(
            self.step,
            n_steps=n_steps,
            warmup_steps=round(optim.warmup_share * n_steps),
            decay_steps=round(optim.decay_share * n_steps),
        )
        parameters = list(self.parameters.values())
        sum_gradients_(parameters, self.mesh.world)
        self.grad_norm = clip_gradients_(parameters, optim.clip_norm, self.mesh.world)
        if not math.isfinite(self.grad_norm):
            raise TrainingError(
                f"the gradient's norm became {self.grad_norm} at step {self.step}; lower optim.lr; the last checkpoint "
                "is untouched"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def log(self, **metrics: float | int) -> None:
        """Write the step's line, if one is due. Names with a slash are given with two underscores in its place."""
        named = {name.replace("__", "/"): value for name, value in metrics.items()}
        self._detail = f"loss {named['loss']:.3f}" if "loss" in named else self._detail
        due = (self.step + 1) % self.settings.log_every == 0 or self.step + 1 == self.settings.steps
        if due and self.mesh.is_first:
            head = {"step": self.step + 1, "learning_rate": self.lr, "grad_norm": self.grad_norm}
            self.run.log(head | {name: value for name, value in named.items() if math.isfinite(value)})

    def generator(self, *purpose: int) -> torch.Generator:
        """Random numbers that depend on the seed, the step and ``purpose`` alone."""
        return torch.Generator().manual_seed(mixed_key(self.settings.seed, self.step, *purpose) >> 1)

    def order(self, n_records: int) -> Order:
        """Which of so many records each step sees, and this process's share of them."""
        settings = self.settings
        return Order(
            n_records,
            batch_size=settings.batch_size,
            micro_batch=settings.micro_batch,
            seed=settings.seed,
            group=self.mesh.world,
        )

    def means(self) -> Means:
        """Means over the parts of a step, on all processes."""
        return Means(self.mesh.world)

    def _checkpoint(self) -> None:
        tensors = self._tensors()  # on every process: weights may have to come together
        if self.mesh.is_first:
            self.checkpoints.save(self.step, tensors, {})

    def _tensors(self) -> dict[str, Tensor]:
        named = {f"weights.{name}": parameter.data for name, parameter in self.parameters.items()}
        adam = state_tensors(self.optimizer, self.parameters.items())
        named |= {f"adam.{name}": value for name, value in adam.items()}
        for owner, stateful in self.state.items():
            named |= {f"{owner}.{name}": value for name, value in stateful.tensors().items()}
        return {name: whole(value.detach()).cpu().contiguous() for name, value in named.items()}

    def _restore(self) -> None:
        saved = self.checkpoints.latest()
        if saved is None:
            return

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in saved.tensors.items() if k.startswith(prefix)}

        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(placed_like(saved.tensors[f"weights.{name}"], parameter))
        restore_state_(self.optimizer, self.parameters.items(), self._placed(under("adam.")))
        for owner, stateful in self.state.items():
            stateful.restore(under(f"{owner}."))
        self.step = saved.step

    def _placed(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Adam's moments where the parameters that they belong to are."""
        owners = {name: self.parameters[name.rpartition(".")[0]] for name in moments}
        return {name: placed_like(value, owners[name]) for name, value in moments.items()}


class Means:
    """Running means of a step's metrics over its parts and processes, each weighted by what it holds."""

    def __init__(self, group: dist.Group = dist.ALONE) -> None:
        self._group = group
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, **values: Float[Tensor, " part"]) -> None:
        """The values of a part's records; NaN stands for a record without this value."""
        for name, tensor in values.items():
            known = tensor.detach().double()
            known = known[~known.isnan()]
            self._sums[name] = self._sums.get(name, 0.0) + float(known.sum())
            self._counts[name] = self._counts.get(name, 0) + len(known)

    def means(self) -> dict[str, float]:
        """Of all processes, which must have added values of the same names in the same order."""
        mine = torch.tensor([[self._sums[name], self._counts[name]] for name in self._sums], dtype=torch.float64)
        both = self._group.sum(mine).tolist()
        return {name: total / n if n else math.nan for name, (total, n) in zip(self._sums, both, strict=True)}
