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
    json: AsJson = False,
) -> None:
    """Print how a directory was made and whether it is finished."""
    stages = (
        [path]
        if (path / "run.json").exists()
        else sorted(p.parent for p in path.glob("*/run.json") if not atomic.is_leftover(p.parent))
        if path.is_dir()
        else []
    )
    if not stages:
        raise ArtifactError(f"{path} is no stage directory and holds none; make one with saelab cache or saelab demo")
    described = [describe(stage) for stage in stages]
    if json:
        emit(described)
        return
    for stage in described:
        print(f"{stage['path']}  [{stage['stage']}]  {stage['state']}")
        for heading in ("config", "parents", "last_metrics"):
            if stage[heading]:
                print(f"  {heading}:")
                print("\n".join(f"    {key} = {value}" for key, value in stage[heading].items()))


def describe(path: Path) -> dict[str, Any]:
    """The facts of one stage directory, as plain data."""
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
    }
