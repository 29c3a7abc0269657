"""Checkpoints that survive a kill: safetensors and JSON, one directory a step, renamed when whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saelab import atomic
from saelab.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: ``step_000001000/{state.safetensors, state.json}`` in ``directory``."""

    def __init__(self, directory: Path, *, keep_last: int = 2, keep_every: int | None = None) -> None:
        self.directory = directory
        self.keep_last = keep_last
        self.keep_every = keep_every

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step``; older ones go only after it is whole on the disk.

        Raises:
            ArtifactError: the disk is full; the older checkpoints are untouched.
        """
        from safetensors.torch import save_file

        with atomic.replacing_directory(self.directory / f"step_{step:09d}") as folder:
            save_file(dict(tensors), folder / "state.safetensors")
            digest = atomic.sha256(folder / "state.safetensors")
            atomic.write_json(folder / "state.json", {"step": step, "sha256": digest, **state})
        self.prune()

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint, or None before the first.

        Raises:
            ArtifactError: its content does not match its checksum.
        """
        steps = self.steps()
        return self.load(steps[-1]) if steps else None

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``, checked against its checksum.

        Raises:
            ArtifactError: its content does not match its checksum, or a part of it is missing.
        """
        from safetensors.torch import load_file

        folder = self.directory / f"step_{step:09d}"
        try:
            state = json.loads((folder / "state.json").read_text("utf-8"))
            whole = atomic.sha256(folder / "state.safetensors") == state.pop("sha256") and state["step"] == step
        except (OSError, ValueError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise ArtifactError(
                f"{folder} is damaged (its checksum differs); delete it to continue from an older checkpoint"
            )
        return Checkpoint(state.pop("step"), load_file(folder / "state.safetensors"), state)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return sorted(int(p.name.removeprefix("step_")) for p in self.directory.glob("step_*") if p.name[5:].isdigit())

    def prune(self) -> None:
        """Remove all checkpoints but the last ones and those to keep."""
        for step in self.steps()[: -self.keep_last]:
            if self.keep_every is None or step % self.keep_every:
                shutil.rmtree(self.directory / f"step_{step:09d}")
