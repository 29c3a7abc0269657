"""Checkpoints of a dictionary that is spread over processes, each of which writes its own part.

A step's directory is torch.distributed.checkpoint's (``__0_0.distcp``, ``.metadata``) with a ``state.json`` that holds
the hash of every file. It is written under a temporary name and renamed when all parts are on the disk. Any number of
processes can read it, and one alone too; ``.metadata`` is a pickle, so its hash is checked before, and it may name
nothing but the classes that torch puts there.
"""

from __future__ import annotations

import contextlib
import json
import pickletools
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saelab import atomic, dist
from saelab.checkpoint import Checkpoint, Checkpoints
from saelab.errors import ArtifactError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.tensor import Placement

#: Parameters with one row for each feature, and those without.
BY_FEATURE = frozenset({"encoder", "W_dec", "b_enc"})
SHARED = frozenset({"b_dec"})

#: What torch names in ``.metadata``; a pickle that names anything else is not unpickled.
_KNOWN = frozenset(
    {
        "pathlib PosixPath",
        "pathlib._local PosixPath",
        "torch Size",
        "torch.serialization _get_layout",
        "torch.distributed.checkpoint.filesystem _StorageInfo",
        *(f"torch {dtype}" for dtype in ("float64", "float32", "bfloat16", "float16", "int64", "int32", "bool")),
        *(
            f"torch.distributed.checkpoint.metadata {name}"
            for name in ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
                         "TensorStorageMetadata", "_MEM_FORMAT_ENCODING")
        ),
    }
)  # fmt: skip
_PART = re.compile(r"__\d+_\d+\.distcp")


class AnyCheckpoints(Checkpoints):
    """Checkpoints of one process, which also reads those that several have written."""

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``, checked against its checksums.

        Raises:
            ArtifactError: its content does not match its checksums, or a part of it is missing.
        """
        folder = self.directory / f"step_{step:09d}"
        if not (folder / ".metadata").exists():
            return super().load(step)
        state = _checked_state(folder, step, dist.ALONE)
        metadata = _read_metadata(folder)
        tensors = {name: torch.empty(found.size, dtype=found.properties.dtype) for name, found in _entries(metadata)}
        _read_into(tensors, folder, metadata, alone=True)
        return Checkpoint(step, tensors, state)


class ShardedCheckpoints:
    """The checkpoints of a run whose features are spread over ``mesh``. Every process makes every call."""

    def __init__(self, directory: Path, mesh: dist.Mesh, *, keep_every: int | None = None) -> None:
        self._mesh = mesh
        self._files = Checkpoints(directory, keep_every=keep_every)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step``; older ones go only after it is whole on the disk.

        Raises:
            ArtifactError: the disk of some process is full; the older checkpoints are untouched.
        """
        import torch.distributed.checkpoint as dcp

        folder = self._files.directory / f"step_{step:09d}"
        temporary = folder.with_name(f"{folder.name}.part-sharded")  # one name that all processes know
        dist.on_first(self._mesh, lambda: _empty(temporary))
        with _explained(folder):
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(temporary), no_dist=False)
        dist.on_first(self._mesh, lambda: self._publish(temporary, folder, step, state))

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or None before the first; large tensors are spread over the processes.

        Raises:
            ArtifactError: its content does not match its checksums, or a part of it is missing.
        """
        steps = self._files.steps()
        self._mesh.world.barrier()  # nobody writes a new one before all have looked
        return self._load(steps[-1]) if steps else None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return self._files.steps()

    def _load(self, step: int) -> Checkpoint:
        folder = self._files.directory / f"step_{step:09d}"
        if not (folder / ".metadata").exists():
            saved = self._files.load(step)
            return saved._replace(tensors={name: self._spread(name, value) for name, value in saved.tensors.items()})
        state = _checked_state(folder, step, self._mesh.world)
        metadata = _read_metadata(folder)
        tensors = {name: self._empty(name, found.size, found.properties.dtype) for name, found in _entries(metadata)}
        _read_into(tensors, folder, metadata, alone=False)
        return Checkpoint(step, tensors, state)

    def _spread(self, name: str, value: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        places = placements(name, value.ndim)
        # None: every process has read the whole, so there is nothing to send
        return value if places is None else distribute_tensor(value, self._mesh.devices, places, src_data_rank=None)

    def _empty(self, name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        from torch.distributed.tensor import empty

        places = placements(name, len(size))
        if places is None:
            return torch.empty(size, dtype=dtype)
        return empty(*size, dtype=dtype, device_mesh=self._mesh.devices, placements=places)

    def _publish(self, temporary: Path, folder: Path, step: int, state: Mapping[str, Any]) -> None:
        """Seal the directory with the hashes of its files, and give it its name."""
        hashes = {file.name: atomic.sha256(file) for file in sorted(temporary.iterdir())}
        atomic.write_json(temporary / "state.json", {"step": step, "sha256": hashes, **state})
        atomic.put_directory(temporary, folder)
        self._files.prune()


def placements(name: str, n_dims: int) -> list[Placement] | None:
    """Where the tensor of a checkpoint lives on the axes (data, features) of a mesh; None for a plain one on each."""
    from torch.distributed.tensor import Replicate, Shard

    parts = set(name.split("."))
    if not n_dims or not parts & (BY_FEATURE | SHARED):
        return None
    return [Replicate(), Shard(0) if parts & BY_FEATURE else Replicate()]


def _empty(folder: Path) -> None:
    with atomic.explained(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def _checked_state(folder: Path, step: int, group: dist.Group) -> dict[str, Any]:
    """What ``state.json`` says besides, once the files are what it says; processes share the work of hashing.

    Raises:
        ArtifactError: a file is not what was written, is missing, or is one too many.
    """
    whole = False
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        hashes = state.pop("sha256")
        names = sorted(hashes)
        mine = {".metadata", *names[group.rank :: group.size]}
        whole = (
            state.pop("step") == step
            and all(name == ".metadata" or _PART.fullmatch(name) for name in names)
            and names == sorted(file.name for file in folder.iterdir() if file.name != "state.json")
            and all(atomic.sha256(folder / name) == hashes[name] for name in mine)
        )
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        whole = False
    if bool(group.any(torch.tensor(not whole))):
        raise ArtifactError(
            f"{folder} is damaged (its checksum differs); delete it to continue from an older checkpoint"
        )
    return state


def _read_metadata(folder: Path) -> Metadata:
    """torch's description of a checkpoint, whose hash has been checked.

    Raises:
        ArtifactError: it names something that torch does not put there, or describes what training does not save.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata

    try:
        strange = [name for name in named_in_pickle((folder / ".metadata").read_bytes()) if name not in _KNOWN]
    except ValueError as error:
        raise ArtifactError(f"{folder}/.metadata is no description of a checkpoint ({error}); do not use it") from error
    if strange:
        raise ArtifactError(f"{folder}/.metadata would run {strange[0]!r} when read; do not use files of this origin")
    metadata = FileSystemReader(folder).read_metadata()
    if not isinstance(metadata, Metadata):
        raise ArtifactError(f"{folder}/.metadata describes no checkpoint; do not use it")
    return metadata


def named_in_pickle(data: bytes) -> list[str]:
    """Every ``module name`` that unpickling would look up; "?" where that cannot be told without unpickling.

    It can be told where the two strings of a STACK_GLOBAL are pushed right before it, as in torch's pickles.
    """
    found: list[str] = []
    memo: dict[int, object] = {}
    pushed: list[object] = []  # what the latest operations pushed, None for anything but a string
    for operation, argument, _ in pickletools.genops(data):
        name = operation.name
        if name in ("MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT"):
            memo[len(memo) if name == "MEMOIZE" else int(str(argument))] = pushed[-1] if pushed else None
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            pushed.append(memo.get(int(str(argument))))
        elif name in ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"):
            pushed.append(argument)
        elif name == "STACK_GLOBAL":
            module, attribute = pushed[-2:] if len(pushed) > 1 else (None, None)
            found.append(f"{module} {attribute}" if isinstance(module, str) and isinstance(attribute, str) else "?")
            pushed.append(None)
        elif name == "GLOBAL":
            found.append(str(argument))
            pushed.append(None)
        elif name in ("INST", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "DUP", "POP", "POP_MARK"):
            found.append("?")
        elif name not in ("PROTO", "FRAME", "STOP"):
            pushed.append(None)
    return found


def _entries(metadata: Metadata) -> list[tuple[str, Any]]:
    """Name and description of each tensor.

    Raises:
        ArtifactError: something else than tensors, which torch would unpickle, or a file outside of the directory.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = metadata.state_dict_metadata
    strange = [name for name, found in entries.items() if not isinstance(found, TensorStorageMetadata)]
    outside = [info.relative_path for info in (metadata.storage_data or {}).values()]
    strange += [path for path in outside if not _PART.fullmatch(str(path))]
    if strange:
        raise ArtifactError(f"the checkpoint holds {strange[0]!r}, which training does not save; do not use it")
    return list(entries.items())


def _read_into(tensors: dict[str, Tensor], folder: Path, metadata: Metadata, *, alone: bool) -> None:
    """Fill ``tensors`` in place."""
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    reader.read_metadata = lambda *_, **__: metadata  # type: ignore[method-assign] # it has been read, and checked
    with _explained(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # which is meant
        dcp.load(tensors, storage_reader=reader, no_dist=alone)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """What torch reports from some process, as the failure of the disk or of the connection that it was.

    Raises:
        ArtifactError: the disk of some process is full.
        DistributedError: another process is gone.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with dist.contact():
            yield
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        with atomic.explained(folder), dist.contact():
            raise causes[0] from error
