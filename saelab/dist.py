"""The processes that work together: torchrun's process group, or its single-process twin.

Code is handed a `Group` and asks it for sums, means and messages; it never asks how many processes there are. When one
dies or falls silent, the others end within a minute with one sentence: a broken connection is noticed at once, a silent
process (stopped, or on a machine that lost its power) by the heartbeat that each process leaves in the common store.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
import torch.distributed as torch_dist
from jaxtyping import Bool
from torch import Tensor

from saelab.errors import ConfigError, DistributedError, SaelabError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_log = logging.getLogger(__name__)
T = TypeVar("T")

#: A process that shows no sign of life for so long is given up.
PATIENCE_S = 30.0
#: Processes that have not met after so long are not all there.
MEETING_S = 60.0
#: Waiting for a process that is alive has this end; a slow disk must not be taken for a death.
_WAIT = datetime.timedelta(hours=1)


@runtime_checkable
class Group(Protocol):
    """Some processes, of which this one is number ``rank`` of ``size``. Every member must make every call.

    Results may be the arguments themselves: do not change either afterwards.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all members, the same bits on each."""
        ...

    def mean(self, tensor: Tensor) -> Tensor: ...

    def smallest(self, tensor: Tensor) -> Tensor: ...

    def any(self, mask: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """True where it is True on some member."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all members, which have one shape, in the order of their ranks."""
        ...

    def gather_to_first(self, tensor: Tensor) -> list[Tensor]:
        """As ``gather`` for the first member; nothing for the others."""
        ...

    def barrier(self) -> None:
        """Wait until every member is here."""
        ...


class Alone:
    """One process and nobody else: every sum is its own."""

    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        return tensor

    def smallest(self, tensor: Tensor) -> Tensor:
        return tensor

    def any(self, mask: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        return mask

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def gather_to_first(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def barrier(self) -> None:
        pass


class Together:
    """Members of a torch process group.

    Raises:
        DistributedError: (every method) another process is gone.
    """

    def __init__(self, group: torch_dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = torch_dist.get_rank(group), torch_dist.get_world_size(group)
        self.n_bytes = 0
        """What this process has handed over so far: the size of each tensor that it reduced or gathered."""

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, torch_dist.ReduceOp.SUM)

    def mean(self, tensor: Tensor) -> Tensor:
        return self.sum(tensor) / self.size

    def smallest(self, tensor: Tensor) -> Tensor:
        return self._reduced(tensor, torch_dist.ReduceOp.MIN)

    def any(self, mask: Bool[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        return self._reduced(mask.to(torch.uint8), torch_dist.ReduceOp.MAX).bool()

    def gather(self, tensor: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        self.n_bytes += tensor.nbytes
        with contact():
            torch_dist.all_gather(everyone, tensor.contiguous(), group=self._group)
        return everyone

    def gather_to_first(self, tensor: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        self.n_bytes += tensor.nbytes
        with contact():
            torch_dist.gather(tensor.contiguous(), everyone, group=self._group, group_dst=0)
        return everyone or []

    def barrier(self) -> None:
        with contact():
            torch_dist.barrier(self._group)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        reduced = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.n_bytes += tensor.nbytes
        with contact():
            torch_dist.all_reduce(reduced, op=operation, group=self._group)
        return reduced


class Mesh(NamedTuple):
    """All processes as a table: a row shares the features of an SAE, a column the tokens of a batch."""

    world: Group
    data: Group
    """The processes with the same features, which see different tokens."""
    features: Group
    """The processes that see the same tokens, and hold different features."""
    devices: DeviceMesh | None
    """The same table, with the axes "data" and "features", as torch's DTensor takes it; None for one process."""

    @property
    def in_words(self) -> str:
        if self.world.size == 1:
            return "1 process"
        return f"{self.world.size} processes: tokens over {self.data.size}, features over {self.features.size}"

    def command(self, arguments: str) -> str:
        """How to call saelab with as many processes again."""
        if self.world.size == 1:
            return f"saelab {arguments}"
        shards = f" --feature-shards {self.features.size}" if self.features.size > 1 else ""
        return f"torchrun --nproc-per-node {self.world.size} -m saelab {arguments}{shards}"

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.world.rank == 0


ALONE = Alone()
ONE_PROCESS = Mesh(ALONE, ALONE, ALONE, None)


@contextlib.contextmanager
def joined(*, feature_shards: int = 1, patience_s: float = PATIENCE_S) -> Iterator[Mesh]:
    """Meet the other processes that torchrun started, or be the only one where it did not.

    Of the processes that end by a SaelabError only the first says so; in the others it becomes a silent exit.

    Raises:
        ConfigError: the number of processes is no multiple of ``feature_shards``.
        DistributedError: the others do not come, or one is gone.
    """
    size = n_started()
    if size == 1:
        _check_shards(feature_shards, size)
        yield ONE_PROCESS
        return
    store = _common_store()
    heartbeat = _Heartbeat(store, patience_s)
    try:
        try:
            _check_shards(feature_shards, size)
            _connect(store)
            mesh = _mesh(size // feature_shards, feature_shards)
            if not mesh.is_first:  # what all have to say, one says
                logging.getLogger("saelab").setLevel(logging.CRITICAL)
            yield mesh
            mesh.world.barrier()
        finally:
            heartbeat.stop()
    except SaelabError as error:
        if _speaks_first(store):
            raise
        raise SystemExit(2) from error
    torch_dist.destroy_process_group()


def n_started() -> int:
    """Processes that torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_several(what: str) -> None:
    """Raise ConfigError where torchrun has started several processes for ``what`` is the work of one."""
    if n_started() > 1:
        raise ConfigError(f"{what} is the work of one process, but torchrun started {n_started()}; leave torchrun out")


def _check_shards(feature_shards: int, size: int) -> None:
    if feature_shards < 1 or size % feature_shards:
        raise ConfigError(
            f"--feature-shards {feature_shards} does not divide the number of processes, which is {size}; start with: "
            f"torchrun --nproc-per-node {max(2, feature_shards)} -m saelab train ..., or choose another number"
        )


@contextlib.contextmanager
def contact() -> Iterator[None]:
    """A connection that breaks within the block is told as one sentence.

    Raises:
        DistributedError: torch's process group failed.
    """
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(_lost("another process of this run broke off")) from error


def on_first(mesh: Mesh, work: Callable[[], T]) -> T | None:
    """``work()`` on the first process, once all have come here; the others wait for it, and get None."""
    mesh.world.barrier()
    result = work() if mesh.is_first else None
    mesh.world.barrier()
    return result


class _Heartbeat:
    """A thread that tells the others that this process lives, and ends it when one of them does not.

    A thread, because the process itself may be waiting in a call that nothing but the dead one could end.
    """

    def __init__(self, store: torch_dist.Store, patience_s: float) -> None:
        self._rank, self._size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        # its own connection: the process may be waiting on the other
        self._store = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(datetime.timedelta(seconds=patience_s))
        self._patience_s = patience_s
        self._over = threading.Event()
        self._store.set(_beat_of(self._rank), "0")
        with _meeting(self._size):
            self._store.wait([_beat_of(peer) for peer in range(self._size)], datetime.timedelta(seconds=MEETING_S))
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()

    def _run(self) -> None:
        peers = [peer for peer in range(self._size) if peer != self._rank]
        heard = {peer: (b"", time.monotonic()) for peer in peers}
        for number in itertools.count(1):
            if self._over.wait(self._patience_s / 10):
                return
            try:
                self._store.set(_beat_of(self._rank), str(number))
                beats = self._store.multi_get([_beat_of(peer) for peer in peers])
            except RuntimeError:  # whoever keeps the store is gone; at a regular end all leave within this second
                if not self._over.wait(1):
                    self._give_up("the process that keeps the common store of this run is gone")
                return
            for peer, beat in zip(peers, beats, strict=True):
                last, since = heard[peer]
                if beat != last:
                    heard[peer] = beat, time.monotonic()
                elif time.monotonic() - since > self._patience_s:
                    self._give_up(f"process {peer} of {self._size} has been silent for {self._patience_s:g} s")
                    return

    def _give_up(self, reason: str) -> None:
        """End the process as a kill would: an exception here would not reach the thread that waits."""
        if _speaks_first(self._store):
            _log.critical("error: %s", _lost(reason))
        logging.shutdown()
        os._exit(2)


def _lost(reason: str) -> str:
    return f"{reason}; the last checkpoint is whole, continue from it with --resume"


def _beat_of(rank: int) -> str:
    return f"saelab/alive/{rank}"


def _speaks_first(store: torch_dist.Store) -> bool:
    """Whether no process has told the user why the run ends; where the store itself is gone each speaks for itself."""
    try:
        return store.add("saelab/spoken", 1) == 1
    except RuntimeError:
        return True


def _common_store() -> torch_dist.Store:
    """The store that torchrun keeps for all processes, at the place that its variables name."""
    with _meeting(n_started()):
        try:
            store, _, _ = next(torch_dist.rendezvous("env://", timeout=datetime.timedelta(seconds=MEETING_S)))
        except ValueError as error:  # a variable is missing
            raise DistributedError(
                f"WORLD_SIZE is {n_started()}, but {error}; start with torchrun, or unset it"
            ) from error
    return store


def _connect(store: torch_dist.Store) -> None:
    """Make torch's group of all processes, which are known to be there."""
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    with contact():
        torch_dist.init_process_group(
            backend, store=store, rank=int(os.environ["RANK"]), world_size=n_started(), timeout=_WAIT
        )


@contextlib.contextmanager
def _meeting(size: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DistributedError(
            f"the {size} processes of this run did not find each other within {MEETING_S:g} s; "
            "start all of them, with one --rdzv-endpoint"
        ) from error


def _mesh(n_data: int, n_features: int) -> Mesh:
    from torch.distributed.device_mesh import init_device_mesh

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contact():
        devices = init_device_mesh(device, (n_data, n_features), mesh_dim_names=("data", "features"))
    world = torch_dist.group.WORLD
    assert world is not None
    return Mesh(Together(world), Together(devices.get_group("data")), Together(devices.get_group("features")), devices)
