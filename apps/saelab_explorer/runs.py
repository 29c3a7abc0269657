"""Which runs there are, and what each holds. A run is found by name in a registry, never by a path from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saelab import rundir
from saelab.errors import ArtifactError, ConfigError, nearest


@dataclass(frozen=True)
class Run:
    """A workspace: a directory that holds stage directories."""

    name: str
    path: Path

    def stage(self, stage: str) -> Path:
        """The finished directory of ``stage``.

        Raises:
            ArtifactError: there is none, or it is unfinished, or there are several.
        """
        return rundir.find(self.path, stage)

    def has(self, stage: str) -> bool:
        """Whether ``stage`` is there and finished."""
        try:
            self.stage(stage)
        except ArtifactError:
            return False
        return True

    def command(self, stage: str) -> str:
        """What to type to make the artefact of ``stage``: continue it where it was begun, start it otherwise."""
        begun = self.begun(stage)
        verb = {"activations": "cache", "sae": "train"}.get(stage, stage)
        if begun and stage in ("activations", "sae", "index") and not (begun / "DONE").exists():
            return f"saelab {verb} --resume {begun}"
        if stage == "activations":
            return f"saelab cache --out {self.path / 'activations'}"
        return f"saelab {verb} {self.path}"

    def begun(self, stage: str) -> Path | None:
        """The directory of ``stage``, finished or not; the one named like the stage where there are several."""
        found = [path for path in stage_directories(self.path) if stage_of(path) == stage]
        return min(found, key=lambda path: (path.name != stage, path.name), default=None)


def find_runs(root: Path) -> dict[str, Run]:
    """Runs directly under ``root``, by name. Links that lead out of ``root`` are not followed.

    Raises:
        ArtifactError: ``root`` is no directory.
    """
    root = root.resolve()
    if not root.is_dir():
        raise ArtifactError(f"there is no directory {root}; make a run with: saelab demo")
    inside = (path for path in sorted(root.iterdir()) if path.is_dir() and path.resolve().is_relative_to(root))
    return {path.name: Run(path.name, path) for path in inside if is_run(path)}


def is_run(path: Path) -> bool:
    """Whether ``path`` holds at least one stage directory."""
    return any(stage_of(inner) in rundir.STAGES for inner in stage_directories(path))


def root_and_name(path: Path, run: str | None) -> tuple[Path, str | None]:
    """The registry's root and the run to open first: ``path`` may be the root, or one run in it.

    Raises:
        ArtifactError: no such directory.
        ConfigError: the root has no run of that name.
    """
    path = path.resolve()
    if path.is_dir() and is_run(path) and not _holds_runs(path) and run is None:
        return path.parent, path.name
    runs = find_runs(path)
    if run is not None and run not in runs:
        raise ConfigError(f"{path} holds no run {run!r}; " + (nearest(run, runs) if runs else "it holds no run at all"))
    return path, run


def _holds_runs(path: Path) -> bool:
    """Whether ``path`` holds workspaces, also where trained models, which are stages, lie beside them."""
    return any(stage_of(inner) is None and is_run(inner) for inner in stage_directories(path))


def read_curves(run: Run) -> list[dict[str, Any]]:
    """Lines of the training log, also of a training that is still under way; empty where there is none."""
    begun = run.begun("sae")
    if begun is None or not (begun / "metrics.jsonl").exists():
        return []
    return rundir.read_metrics(begun)


def read_evaluation(run: Run) -> dict[str, Any]:
    """The content of eval.json.

    Raises:
        ArtifactError: the run was not evaluated yet, or the file is damaged.
    """
    return read_json(run.stage("eval") / "eval.json")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{file} cannot be read ({error}); make it again") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{file} does not hold a JSON object; make it again")
    return value


@dataclass(frozen=True)
class StageRecord:
    """Where a stage's artefact comes from."""

    stage: str
    path: Path
    finished: bool
    config: Mapping[str, Any]
    command: str
    started: str
    versions: Mapping[str, str]
    parents: Mapping[str, str]
    """First digits of the hash of each input."""
    sha256: str


def provenance(run: Run) -> list[StageRecord]:
    """What is known about the making of each stage that the run holds, in the order of the data's way."""
    records = []
    for stage in rundir.STAGES:
        path = run.begun(stage)
        if path is not None:
            settings, env, parents = (_json_or_empty(path / name) for name in ("run.json", "env.json", "parents.json"))
            records.append(
                StageRecord(
                    stage=stage,
                    path=path,
                    finished=(path / "DONE").exists() or not (path / "run.json").exists(),
                    config=settings.get("config", {}),
                    command=" ".join(env.get("command", [])),
                    started=env.get("started", ""),
                    versions={name: version for name, version in env.get("versions", {}).items() if version},
                    parents={name: parent["sha256"] for name, parent in parents.items()},
                    sha256=rundir.fingerprint(path) if (path / rundir.STAGES[stage]).exists() else "",
                )
            )
    return records


def _json_or_empty(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def stage_directories(path: Path) -> list[Path]:
    """Directories in ``path`` that may be stages; none where it may not be read, so that it hides no other."""
    try:
        return sorted(inner for inner in path.iterdir() if inner.is_dir() and ".part-" not in inner.name)
    except PermissionError:
        return []


def stage_of(path: Path) -> str | None:
    """The stage that a directory says it is; None where it says nothing readable: one bad run hides no other."""
    if (path / "run.json").exists():
        try:
            return read_json(path / "run.json").get("stage")
        except ArtifactError:
            return None
    return next((stage for stage, manifest in rundir.STAGES.items() if (path / manifest).exists()), None)
