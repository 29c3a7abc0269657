"""A run is a directory. Each stage (cache, train, eval, index, ...) owns one and writes it by the same rules.

run.json        resolved config and stage name          written first
parents.json    inputs and the hash of their manifests  a changed input is an error, not a surprise
env.json        versions, command line, revision        never compared bit by bit
metrics.jsonl   one JSON object a line
DONE            written last
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from saelab import atomic
from saelab.checkpoint import Checkpoints
from saelab.errors import ArtifactError, nearest

SCHEMA = 1

#: Each stage, and the file that identifies the content of its directory.
STAGES = {
    "activations": "manifest.json",
    "sae": "cfg.json",
    "sweep": "sweep.json",
    "eval": "eval.json",
    "members": "members.json",
    "index": "index.json",
    "steer": "steer.json",
    "probe": "probe.json",
    "explain": "explain.json",
    "lens": "lens.json",
    "model": "model.json",
    "constitution": "constitution.json",
}


class StageWriter:
    """The one writer of a stage directory."""

    def __init__(self, path: Path, stage: str) -> None:
        self.path = path
        self.stage = stage

    @classmethod
    def create(
        cls, path: Path, *, stage: str, config: Mapping[str, Any], parents: Mapping[str, Path] | None = None
    ) -> StageWriter:
        """Start a new stage in ``path``, which must be empty, absent, or a start killed before it wrote run.json.

        Raises:
            ArtifactError: ``path`` already holds something.
        """
        refuse_taken(path)
        if path.exists():
            atomic.sweep(path)
        inputs = {name: {"path": _relative(p, path), "sha256": fingerprint(p)} for name, p in (parents or {}).items()}
        atomic.write_json(path / "parents.json", inputs)
        atomic.write_json(path / "env.json", environment())
        atomic.write_json(path / "run.json", {"schema": SCHEMA, "stage": stage, "config": dict(config)})
        return cls(path, stage)

    @classmethod
    def resume(cls, path: Path, *, stage: str) -> StageWriter:
        """Continue an interrupted stage; its leftovers are swept and its inputs checked.

        Raises:
            ArtifactError: not such a stage, or an input has changed since it started.
        """
        read_run(path, stage)
        check_parents(path)
        for directory in (path, path / "checkpoints"):
            if directory.exists():
                atomic.sweep(directory)
        return cls(path, stage)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        atomic.append(self.path / "metrics.jsonl", json.dumps(record, allow_nan=False) + "\n")

    def flush_metrics(self) -> None:
        """Force the lines so far to the disk."""
        if (self.path / "metrics.jsonl").exists():
            atomic.fsync(self.path / "metrics.jsonl")

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines after ``step`` and a torn last line, so that a resumed run logs each step once."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            atomic.write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def finish(self) -> None:
        """Write DONE: from now on readers trust the directory."""
        atomic.write_bytes(self.path / "DONE", b"")


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Within the block no other process may write the stage directory ``path``, on this machine or over NFS.

    The lock is the system's, on a file beside ``path``, and ends with its holder: none is left behind by a kill, so
    none has to be judged stale. Process and machine stand in the file for the one who is refused.

    Raises:
        ArtifactError: another process holds it, or the directory is not writable.
    """
    file = path.with_name(f"{path.name}.part-writer")
    with atomic.explained(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace") or "another process"
            raise ArtifactError(f"{path} is being written by {holder}; wait for it, or choose another --out") from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(handle)


def refuse_taken(path: Path) -> None:
    """Raise ArtifactError when ``path`` holds something that a new stage would mix with.

    What a start leaves that was killed before it wrote run.json does not count.
    """
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file, but a run is a directory; choose another --out")
    files = [] if not path.exists() else [p.name for p in path.iterdir() if not atomic.is_leftover(p)]
    if not set(files) - {"parents.json", "env.json"}:
        return
    if "run.json" not in files:
        raise ArtifactError(f"{path} already holds other files; choose another --out")
    if "DONE" in files:
        raise ArtifactError(f"{path} already holds a finished run; choose another --out, or remove it first")
    raise ArtifactError(
        f"{path} already holds an unfinished run; choose another --out, or continue it with --resume {path}"
    )


def check_replaceable(path: Path, stage: str) -> None:
    """Raise ArtifactError unless ``path`` is absent, empty, or an older directory of ``stage``.

    A result that replaces its older self must not replace anything else that --out happens to name.
    """
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file, but a result is a directory; choose another --out")
    if path.exists() and any(path.iterdir()):
        found = _read_json(path / "run.json").get("stage") if (path / "run.json").exists() else None
        if found != stage:
            holds = f"the stage {found!r}" if found else "other files"
            raise ArtifactError(f"{path} holds {holds}, which this result would replace; choose another --out")


def replace_result(
    out: Path,
    result: Mapping[str, Any],
    *,
    stage: str,
    config: Mapping[str, Any],
    parents: Mapping[str, Path],
    texts: Mapping[str, str] | None = None,
) -> None:
    """Put a finished stage whose artefact is the JSON ``result`` in the place of an older one, whole or not at all.

    ``texts`` are further files of it by their names, such as report.md.
    """
    with atomic.replacing_directory(out) as folder:
        writer = StageWriter.create(folder, stage=stage, config=config, parents=parents)
        atomic.write_json(folder / STAGES[stage], result)
        for name, text in (texts or {}).items():
            atomic.write_bytes(folder / name, text.encode())
        writer.finish()


def find(path: str | os.PathLike[str], stage: str) -> Path:
    """The directory of ``stage`` at ``path``: itself, or the one of that kind in a workspace such as ``runs/demo``.

    Raises:
        ArtifactError: no such directory, none or several of that kind, or it is unfinished.
    """
    path = Path(path)
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise ArtifactError(
            f"there is no directory {path}" + (f"; {nearest(path.name, siblings)}" if siblings else "; check the path")
        )
    inside = (p for p in path.iterdir() if p.is_dir() and not atomic.is_leftover(p))
    candidates = [path] if _is_stage(path, stage) else sorted(p for p in inside if _is_stage(p, stage))
    if not candidates:
        raise ArtifactError(f"{path} holds no {stage} directory; make one with: {_maker(stage)}")
    if len(candidates) > 1:
        names = ", ".join(p.name for p in candidates)
        raise ArtifactError(f"{path} holds several {stage} directories ({names}); name the one you mean")
    check_done(candidates[0])
    return candidates[0]


def find_all(path: str | os.PathLike[str], stage: str) -> list[Path]:
    """The finished directories of ``stage`` at ``path``: itself, or all of that kind in a workspace or a sweep.

    Raises:
        ArtifactError: no such directory, or none of that kind that is finished.
    """
    path = Path(path)
    if not path.is_dir() or _is_stage(path, stage):
        return [find(path, stage)]
    inside = sorted(p for p in path.iterdir() if p.is_dir() and not atomic.is_leftover(p) and _is_stage(p, stage))
    finished = [p for p in inside if (p / "DONE").exists() or not (p / "run.json").exists()]
    if inside and not finished:
        check_done(inside[0])
    return finished or [find(path, stage)]


def check_done(path: Path) -> None:
    """Raise ArtifactError for a stage that was interrupted; directories of other tools have no run.json and pass."""
    if (path / "run.json").exists() and not (path / "DONE").exists():
        stage = read_run(path)["stage"]
        steps = Checkpoints(path / "checkpoints").steps()
        at = f" at step {steps[-1]}" if steps else ""
        cure = f"continue it with: saelab {_verb(stage)} --resume {path}"
        if stage not in ("activations", "sae", "sweep", "lens"):
            cure = f"make it again with: saelab {_verb(stage)}"
        raise ArtifactError(f"{path} is unfinished{at}; {cure}")


def check_parents(path: Path) -> None:
    """Raise ArtifactError when an input of the stage at ``path`` changed or vanished since it was used."""
    for name, parent in parents(path).items():
        location = path / parent["path"]
        if not location.exists():
            raise ArtifactError(
                f"{path} was made from {name} at {location.resolve()}, which is gone; put it back or start anew"
            )
        if fingerprint(location) != parent["sha256"]:
            raise ArtifactError(
                f"{name} at {location.resolve()} has changed since {path} was made from it; "
                "start anew with another --out"
            )


def parents(path: Path) -> dict[str, dict[str, str]]:
    """The content of parents.json: for each input its ``path``, relative to ``path``, and ``sha256``."""
    return _read_json(path / "parents.json") if (path / "parents.json").exists() else {}


def parent(path: Path, name: str) -> Path:
    """Where the input ``name`` of the stage at ``path`` lies.

    Raises:
        ArtifactError: the stage records no such input, or it is not there any more.
    """
    known = parents(path)
    if name not in known:
        raise ArtifactError(f"{path} does not say which {name} it was made from; give --{name}")
    location = path / known[name]["path"]
    if not location.exists():
        raise ArtifactError(f"{path} was made from {name} at {location.resolve()}, which is gone; give --{name}")
    return location.resolve()


def read_run(path: Path, stage: str | None = None) -> dict[str, Any]:
    """The content of run.json; with ``stage`` only if it is such a run.

    Raises:
        ArtifactError: there is none, it is damaged, or it belongs to another stage.
    """
    file = path / "run.json"
    if not file.exists():
        raise ArtifactError(f"{path} is no saelab run (it has no run.json); start one with --out {path}")
    run = _read_json(file)
    if not {"stage", "config"} <= set(run):
        raise ArtifactError(f"{file} is damaged (it lacks the stage or its config); put it back, or start anew")
    if stage is not None and run["stage"] != stage:
        raise ArtifactError(
            f"{path} is a run of the stage {run['stage']!r}, not of {stage!r}; "
            f"give a directory made by: {_maker(stage)}"
        )
    return run


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last line, left by a kill, is ignored."""
    lines = (path / "metrics.jsonl").read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def fingerprint(path: Path) -> str:
    """Hash that identifies the content of a stage directory (by its manifest) or of a file.

    Raises:
        ArtifactError: a directory without a manifest.
    """
    if path.is_file():
        return atomic.sha256(path)
    manifests = [path / name for name in STAGES.values() if (path / name).exists()]
    if not manifests and (path / "config.json").exists():  # a model
        manifests = [path / "config.json"]
    if not manifests:
        raise ArtifactError(f"{path} has no manifest, so it is no finished stage; make it again")
    return hashlib.sha256(b"".join(m.read_bytes() for m in manifests)).hexdigest()


def environment() -> dict[str, Any]:
    """What a reader needs to know about where a run was made: versions, machine, command, revision."""
    packages = ("saelab", "torch", "transformers", "transformer-lens", "safetensors", "datasets")
    try:
        revision = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True
        )
        git = revision.stdout.strip() or None
    except FileNotFoundError:
        git = None
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": {name: _version(name) for name in packages},
        "git": git,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_stage(path: Path, stage: str) -> bool:
    run = path / "run.json"
    if run.exists():
        return _read_json(run).get("stage") == stage
    return (path / STAGES[stage]).exists()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file} is damaged ({error}); put it back, or make its directory again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{file} is damaged (it holds no table); put it back, or make its directory again")
    return content


def _relative(location: Path, start: Path) -> str:
    """``location`` as seen from ``start``, true also where a folder on the way to either is a symbolic link.

    The last component keeps its name, so that a workspace with a linked stage can still be moved.
    """
    return os.path.relpath(location.absolute().parent.resolve() / location.name, start.resolve())


def _verb(stage: str) -> str:
    return {"activations": "cache", "sae": "train", "sweep": "train", "members": "eval"}.get(stage, stage)


def _maker(stage: str) -> str:
    return f"saelab {_verb(stage)} --help"
