"""saelab align resume: continue an interrupted run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saelab.cli.align.common import run_recipe
from saelab.cli.console import AsJson, Device
from saelab.errors import ConfigError


def resume(
    run: Annotated[Path, typer.Argument(help="Directory of an interrupted alignment run.")],
    device: Device = None,
    json: AsJson = False,
) -> None:
    """Continue an interrupted alignment run from its latest checkpoint, with the settings it was started with."""
    from saelab import rundir
    from saelab.align.run import recipe_of

    recipe = recipe_of(rundir.read_run(run, "model")["config"])
    if (run / "DONE").exists():
        raise ConfigError(f"{run} is finished, there is nothing to resume; to train on, give it as --model")
    run_recipe(recipe, run, lambda: rundir.StageWriter.resume(run, stage="model"), device=device, json=json)
