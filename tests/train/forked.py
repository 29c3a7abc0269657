"""Several processes on this machine that work together: forked, so that nothing has to be imported again."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from saelab import dist
from saelab.errors import Interrupted, SaelabError

DEADLINE_S = 300


class Ending(NamedTuple):
    """How a process ended."""

    status: int  # 0, 2 for a SaelabError, 130 for Interrupted, 1 for anything else, negative for a signal
    result: Any  # what its work returned
    said: str  # on standard error
    at: float  # seconds since all began


def together(
    n: int,
    folder: Path,
    work: Callable[..., Any],
    *args: Any,
    feature_shards: int = 1,
    patience_s: float = 30.0,
    n_expected: int | None = None,
) -> list[Ending]:
    """``work(mesh, *args)`` in ``n`` processes; returns how each ended, by rank. ``folder`` takes what they say."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    running: dict[int, int] = {}
    for rank in range(n):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
            pid = os.fork()
        if not pid:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(n_expected or n),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            _become(folder / str(rank), work, args, feature_shards, patience_s)
        running[rank] = pid
    # after the last fork, which its thread must not see; torchrun keeps the store outside of the workers too
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    endings: dict[int, Ending] = {}
    while len(endings) < n:
        for rank, pid in running.items():
            if rank not in endings and (done := os.waitpid(pid, os.WNOHANG))[0]:
                endings[rank] = _ending(folder / str(rank), done[1], time.monotonic() - began)
        stopped = [pid for rank, pid in running.items() if rank not in endings and _is_stopped(pid)]
        if len(stopped) == n - len(endings) or time.monotonic() - began > DEADLINE_S:
            for rank, pid in running.items():  # nobody is left to notice it
                if rank not in endings:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    del store
    return [endings[rank] for rank in range(n)]


def results(endings: list[Ending]) -> list[Any]:
    """What the works returned; fails where one did not end well."""
    for ending in endings:
        assert ending.status == 0, ending.said
    return [ending.result for ending in endings]


def _become(
    place: Path, work: Callable[..., Any], args: tuple[Any, ...], feature_shards: int, patience_s: float
) -> None:
    """The rest of a forked process."""
    status = 1
    with (place.with_suffix(".txt")).open("w") as said:
        os.dup2(said.fileno(), 2)
        sys.stderr = said
        logging.getLogger().handlers = [logging.StreamHandler(said)]  # where pytest has put its own
        try:
            with dist.joined(feature_shards=feature_shards, patience_s=patience_s) as mesh:
                torch.save(work(mesh, *args), place.with_suffix(".pt"))
            status = 0
        except SaelabError as error:  # as the command line does
            print(error, file=said)
            status = 130 if isinstance(error, Interrupted) else 2
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc(file=said)
        finally:
            said.flush()
            os._exit(status)


def _ending(place: Path, status: int, at: float) -> Ending:
    file = place.with_suffix(".pt")
    result = torch.load(file, weights_only=False) if file.exists() else None
    said = place.with_suffix(".txt")
    return Ending(os.waitstatus_to_exitcode(status), result, said.read_text() if said.exists() else "", at)


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped with SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False
