"""How training is laid out over processes: one alone, or several that share the tokens of each batch.

A layout says where the weights are, who averages gradients, who writes checkpoints. `saelab.train.sharded` has the one
that also spreads the features.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab import dist, rundir
from saelab.activations.moments import ActivationStats
from saelab.checkpoint import Checkpoint, Checkpoints
from saelab.errors import ConfigError
from saelab.rundir import StageWriter
from saelab.sae.base import SAE, SAEConfig, SAELoss
from saelab.train.sharded_checkpoint import AnyCheckpoints

#: Architectures whose loss is a mean over tokens, or knows how to reach the tokens of other processes (`sae.spread`).
DATA_PARALLEL = (
    "relu", "gated", "topk", "abstopk", "batchtopk", "jumprelu", "matryoshka", "matching_pursuit", "groupmax",
    "transcoder", "crosscoder",
)  # fmt: skip


@runtime_checkable
class ActivationBatches(Protocol):
    """What training needs of its data: a batch is a function of the step alone, so a resumed run sees the same ones."""

    @property
    def d_in(self) -> int: ...

    def at(self, step: int) -> Float[Tensor, "batch *slots d_in"]: ...

    def statistics(self, max_tokens: int) -> ActivationStats | tuple[ActivationStats, ...]:
        """One for each slot, where a token has several."""
        ...


@runtime_checkable
class CheckpointStore(Protocol):
    """Where a run's states are kept; every process calls it, whoever writes."""

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, object]) -> None: ...

    def latest(self) -> Checkpoint | None: ...

    def steps(self) -> list[int]: ...


@runtime_checkable
class Layout(Protocol):
    """What differs between one process and several."""

    mesh: dist.Mesh

    @property
    def keeps_gradients(self) -> bool:
        """Whether a gradient is nobody else's business, so that it need not become a tensor."""
        ...

    def place(self, sae: SAE) -> SAE:
        """The part of a fresh ``sae`` that this process trains."""
        ...

    def average_gradients_(self, sae: SAE) -> None:
        """Replace gradients by their mean over the processes that see other tokens."""
        ...

    def firing_counts(self, sae: SAE, acts: Float[Tensor, "batch *slots d_in"]) -> Int[Tensor, " d_sae"]:
        """On how many tokens of all processes each feature fires."""
        ...

    def checkpoints(self, directory: Path, *, keep_every: int | None) -> CheckpointStore: ...

    def whole(self, sae: SAE) -> SAE:
        """The SAE that ``place`` took apart, on the first process; elsewhere ``sae`` itself."""
        ...


class OneProcess:
    """Nobody to share with."""

    mesh = dist.ONE_PROCESS
    keeps_gradients = True

    def place(self, sae: SAE) -> SAE:
        return sae

    def average_gradients_(self, sae: SAE) -> None:
        pass

    def firing_counts(self, sae: SAE, acts: Float[Tensor, "batch *slots d_in"]) -> Int[Tensor, " d_sae"]:
        return (sae.encode(sae.read_slots(acts)) != 0).sum(0)

    def checkpoints(self, directory: Path, *, keep_every: int | None) -> CheckpointStore:
        return AnyCheckpoints(directory, keep_every=keep_every)

    def whole(self, sae: SAE) -> SAE:
        return sae


class DataParallel:
    """Each process holds all weights and sees its part of the tokens; gradients are averaged.

    Raises:
        ConfigError: the loss of the architecture couples the tokens of a batch in a way that processes do not share.
    """

    keeps_gradients = False

    def __init__(self, mesh: dist.Mesh, cfg: SAEConfig) -> None:
        if cfg.arch not in DATA_PARALLEL:
            raise ConfigError(
                f"architecture {cfg.arch!r} is trained by one process only, because its loss couples all tokens of a "
                f"batch; start it without torchrun, or choose one of {', '.join(DATA_PARALLEL)}"
            )
        self.mesh = mesh

    def place(self, sae: SAE) -> SAE:
        sae.tokens = self.mesh.data
        return sae

    def average_gradients_(self, sae: SAE) -> None:
        for parameter in sae.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(self.mesh.data.mean(parameter.grad))

    def firing_counts(self, sae: SAE, acts: Float[Tensor, "batch *slots d_in"]) -> Int[Tensor, " d_sae"]:
        return self.mesh.data.sum(ALONE.firing_counts(sae, acts))

    def checkpoints(self, directory: Path, *, keep_every: int | None) -> CheckpointStore:
        store = AnyCheckpoints(directory, keep_every=keep_every)
        return store if self.mesh.is_first else _Onlooker(store)

    def whole(self, sae: SAE) -> SAE:
        return sae


ALONE = OneProcess()


class _Onlooker:
    """Reads the checkpoints that another process writes."""

    def __init__(self, store: Checkpoints) -> None:
        self._store = store

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, object]) -> None:
        pass

    def latest(self) -> Checkpoint | None:
        return self._store.latest()

    def steps(self) -> list[int]:
        return self._store.steps()


class SilentStage(StageWriter):
    """The stage directory as the processes see it that write nothing there."""

    def log(self, record: object) -> None:
        pass

    def rewind_metrics(self, step: int) -> None:
        pass

    def flush_metrics(self) -> None:
        pass

    def finish(self) -> None:
        pass


@contextlib.contextmanager
def stage_of(mesh: dist.Mesh, path: Path, begin: Callable[[], StageWriter]) -> Iterator[StageWriter]:
    """The stage that ``begin`` makes on the first process, which alone may write it; elsewhere one that writes nothing.

    Raises:
        ArtifactError: another run writes there, or what ``begin`` raises.
    """
    with rundir.only_writer(path) if mesh.is_first else contextlib.nullcontext():
        yield dist.on_first(mesh, begin) or SilentStage(path, "sae")


class _Portion:
    """This process's part of batches that can only be made whole."""

    def __init__(self, batches: ActivationBatches, group: dist.Group) -> None:
        self._batches, self._group = batches, group

    @property
    def d_in(self) -> int:
        return self._batches.d_in

    def at(self, step: int) -> Float[Tensor, "batch *slots d_in"]:
        return self._batches.at(step).tensor_split(self._group.size)[self._group.rank]

    def statistics(self, max_tokens: int) -> ActivationStats | tuple[ActivationStats, ...]:
        return self._batches.statistics(max_tokens)


@runtime_checkable
class Divisible(Protocol):
    """Batches of which a part can be read alone."""

    def portion_(self, index: int, n_parts: int) -> None: ...


def portion(batches: ActivationBatches, group: dist.Group) -> ActivationBatches:
    """The batches of which each is the part that this process reads: the rank-th of ``group.size`` equal parts."""
    if isinstance(batches, Divisible):
        batches.portion_(group.rank, group.size)
        return batches
    return _Portion(batches, group)


def check_divisible(batch_size: int, mesh: dist.Mesh) -> None:
    """Raise ConfigError unless every process can get as many tokens of a batch as any other, and at least two.

    Two, because a variance over one token is zero.
    """
    n_parts = mesh.data.size
    if batch_size % n_parts or (n_parts > 1 and batch_size < 2 * n_parts):
        raise ConfigError(
            f"a batch of {batch_size} tokens cannot be divided evenly among {n_parts} processes, with at least two for "
            f"each; set batch_size to a multiple of {n_parts}, from {2 * n_parts}"
        )


def over_all_tokens(losses: SAELoss, tokens: dist.Group) -> SAELoss:
    """The losses of the whole batch from those of this process's tokens; detached."""
    scalars = torch.stack([part.detach().to(losses.total.dtype) for part in (losses.total, *losses[1:4], losses.l0)])
    total, reconstruction, sparsity, aux, l0 = tokens.mean(scalars).unbind()
    return SAELoss(total, reconstruction, sparsity, aux, tokens.any(losses.fired), l0)


def clip_gradients_(sae: SAE, limit: float | None) -> float:
    """Scale the gradient down to the norm ``limit``; returns its norm before, over all features wherever they are."""
    parameters = list(sae.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    with dist.contact():
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, math.inf if limit is None else limit, norm)
    return float(norm)
