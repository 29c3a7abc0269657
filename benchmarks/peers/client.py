"""Our side: a peer's process is asked for one step at a time, so that rounds alternate with contenders in this one."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from benchmarks.problem import Problem

ROOT = Path(__file__).parents[2]
#: Where ``make bench-peers`` puts the peers.
DEFAULT_PYTHON = ROOT / ".venv-peer" / "bin" / "python"


class PeerError(RuntimeError):
    """A peer cannot be timed; the message says why, and becomes a row of the table."""


class Peer:
    """A peer's training step in its own process, as a contender."""

    def __init__(self, name: str, problem: Problem, python: Path) -> None:
        self.name, self.lr = name, problem.lr
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.serve"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        try:
            with tempfile.TemporaryDirectory() as directory:
                self.version = self._ask(
                    "build", peer=name, problem=problem.save(Path(directory)), threads=torch.get_num_threads()
                )["version"]
        except BaseException:
            self.close()
            raise

    def seconds(self, batch: int) -> float:
        """Make one step and return how long it took there."""
        return self._ask("step", batch=batch, lr=self.lr)["seconds"]

    def mark_dead(self, *, window: int) -> None:
        self._ask("mark_dead", window=window)

    def held_out_error(self) -> float:
        return self._ask("held_out_error")["value"]

    def peak_bytes(self, batch: int) -> int | None:
        """The memory of one more step."""
        return self._ask("peak_bytes", batch=batch)["value"]

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            stream.close()  # type: ignore[union-attr]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ask(self, wish: str, **request: object) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": wish, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before it ended is read below
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().splitlines()[-1:] or ["it ended without a word"]
            raise PeerError(f"{self.name}: {last[0]}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {_first_sentence(answer['error'])}")
        return answer


def _first_sentence(text: str) -> str:
    """torch's messages go on for pages."""
    return text.splitlines()[0].split(". ")[0][:240]
