"""Run a saelab command in forked children and kill them with SIGKILL at random moments, then let it finish.

usage: kill_driver.py KILLS SEED OUT START...    (START is the command that begins the run in OUT)

A child that finds OUT begun resumes it. Imports happen once, before forking, so a kill costs no start-up; a first,
complete run in OUT.timing measures how long the work takes, and the kills fall anywhere within that time.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path


def child(arguments: list[str]) -> int:
    """Fork; the child becomes ``saelab ARGUMENTS``. Returns the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    from saelab.cli import main

    sys.argv = ["saelab", *arguments]
    status = 1
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    finally:
        sys.stderr.flush()
        os._exit(status)


def finished(pid: int, seconds: float) -> int | None:
    """Exit status of a child that ends within ``seconds``, else None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def begun(out: Path) -> bool:
    """Whether an interrupted run waits there; an index waits beside its place, where an older one may still stand."""
    return any((path / "run.json").exists() for path in (out, out.with_name(f"{out.name}.part-resumable")))


def main() -> None:
    n_kills, seed, out, start = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    verb = start[0]
    import saelab.activations.capture
    import saelab.activations.loader
    import saelab.features.build
    import saelab.train.loop  # noqa: F401

    if verb == "cache":
        import transformers  # noqa: F401
    rng = random.Random(seed)
    timing = out.with_name(out.name + ".timing")
    began = time.monotonic()
    assert os.waitpid(child([*start, "--out", str(timing)]), 0)[1] == 0
    whole = time.monotonic() - began
    shutil.rmtree(timing)
    kills = attempts = 0
    while kills < n_kills:
        attempts += 1
        if (out / "DONE").exists():  # it got through between two kills: begin again, keep counting
            shutil.rmtree(out)
        pid = child([verb, "--resume", str(out)] if begun(out) else [*start, "--out", str(out)])
        status = finished(pid, rng.uniform(0, whole))
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
        else:
            assert status == 0, f"attempt {attempts} ended with status {status}"
    if not (out / "DONE").exists():
        pid = child([verb, "--resume", str(out)] if begun(out) else [*start, "--out", str(out)])
        assert os.waitpid(pid, 0)[1] == 0
    print(f"{kills} kills in {attempts} attempts, each within {whole:.1f} s")


if __name__ == "__main__":
    main()
