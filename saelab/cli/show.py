"""saelab show: what a directory is, how it was made, and whether it is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from saelab import atomic
from saelab.cli.console import AsJson, emit
from saelab.errors import ArtifactError


def show(
    path: Annotated[Path, typer.Argument(help="A stage directory, or a workspace of several.")],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file that has a checksum with it.")] = False,
    json: AsJson = False,
) -> None:
    """Print how a directory was made and whether it is finished.

    With --verify the exit code is 2 if any stage is damaged.
    """
    stages = (
        [path]
        if (path / "run.json").exists()
        else sorted(p.parent for p in path.glob("*/run.json") if not atomic.is_leftover(p.parent))
        if path.is_dir()
        else []
    )
    if not stages:
        raise ArtifactError(f"{path} is no stage directory and holds none; make one with saelab cache or saelab demo")
    described = [describe(stage, verify=verify) for stage in stages]
    if json:
        emit(described)
    else:
        _print(described)
    damaged = [stage["damage"] for stage in described if stage.get("damage")]
    if damaged:
        raise ArtifactError(damaged[0])


def _print(described: list[dict[str, Any]]) -> None:
    for stage in described:
        print(f"{stage['path']}  [{stage['stage']}]  {stage['state']}")
        if "damage" in stage:
            print(f"  verified: {stage['damage'] or 'every file that has a checksum fits it'}")
        for heading in ("config", "parents", "last_metrics"):
            if stage[heading]:
                print(f"  {heading}:")
                print("\n".join(f"    {key} = {value}" for key, value in stage[heading].items()))


def describe(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """The facts of one stage directory, as plain data; with ``verify`` also the first ``damage`` found, or None."""
    from saelab import rundir

    run = rundir.read_run(path)
    try:
        rundir.check_done(path)
        rundir.check_parents(path)
        state = "finished"
    except ArtifactError as error:
        state = str(error)
    metrics = rundir.read_metrics(path) if (path / "metrics.jsonl").exists() else []
    return {
        "path": str(path),
        "stage": run["stage"],
        "state": state,
        "config": run["config"],
        "parents": {name: parent["path"] for name, parent in rundir.parents(path).items()},
        "last_metrics": metrics[-1] if metrics else None,
    } | ({"damage": damage(path, run["stage"])} if verify else {})


def damage(path: Path, stage: str) -> str | None:
    """The sentence about the first file of a stage that is not what its checksum says; None if all are.

    Of an unfinished stage only the checkpoints are looked at: what else there is is checked when it is continued.
    """
    from saelab.checkpoint import Checkpoints

    try:
        checkpoints = Checkpoints(path / "checkpoints")
        for step in checkpoints.steps():
            checkpoints.load(step)
        if (path / "DONE").exists():
            _open_whole(path, stage)
    except ArtifactError as error:
        return str(error)
    return None


def _open_whole(path: Path, stage: str) -> None:
    """Open what the stage made, comparing all of it with the checksums that it has."""
    if stage == "activations":
        from saelab.activations.store import ActivationStore

        ActivationStore.open(path, verify="full")
    elif stage == "index":
        from saelab.features.index import FeatureIndex

        FeatureIndex.open(path, verify="full")
    elif stage == "sae":
        from saelab.sae.io import load_sae

        load_sae(path)
