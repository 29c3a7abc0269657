"""Processes that capture side by side, forked from a server that has imported everything: one starts at once."""

from __future__ import annotations

import json
import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

from activations_fake_model import FakeModel

from saelab.activations.capture import CacheConfig, capture
from saelab.config import from_mapping
from saelab.errors import SaelabError

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["activations_worker", "safetensors.torch"])


class Worker:
    """One process. With ``join`` it waits for a capture to join; without, it begins one or resumes it."""

    def __init__(self, out: Path, config_file: Path, *, join: bool = False) -> None:
        self._receiver, sender = _CONTEXT.Pipe(duplex=False)
        self.process = _CONTEXT.Process(target=_work, args=(out, config_file, join, sender))
        self.process.start()
        sender.close()

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()
        self._receiver.close()

    def forwards(self) -> int:
        """The number of its forward passes, when it has ended by itself; an error's sentence fails the test."""
        result = self._receiver.recv()
        self.process.join()
        self._receiver.close()
        assert isinstance(result, int), result
        return result


def _work(out: Path, config_file: Path, join: bool, sender: Connection) -> None:
    config = from_mapping(CacheConfig, json.loads(config_file.read_text()))
    model = FakeModel(seconds_per_forward=2e-3)
    while join and not (out / "run.json").exists():
        time.sleep(1e-3)
    try:
        capture(config, out, model=model, resume=not join, join=join)
    except SaelabError as error:
        sender.send(str(error))
    else:
        sender.send(model.n_forwards)
