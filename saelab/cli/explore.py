"""saelab explore: the feature explorer in the browser."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from saelab.errors import ArtifactError, Interrupted


def explore(
    root: Annotated[Path, typer.Argument(help="Folder that holds the runs.")] = Path("runs"),
    run: Annotated[str | None, typer.Option(help="Name of the run to open first.")] = None,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 8501,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser.")] = False,
) -> None:
    """Serve the feature explorer on this machine.

    It listens on this machine alone, never on the network, until Ctrl-C.
    """
    if not root.is_dir():
        raise ArtifactError(
            f"there is no folder {root}; give the one that holds your runs, for example: saelab explore runs"
        )
    command = [sys.executable, "-m", "saelab_explorer", str(root), "--port", str(port)]
    command += ["--run", run] if run else []
    command += ["--no-open"] if no_open else []
    try:
        status = subprocess.run(command).returncode
    except KeyboardInterrupt:
        raise Interrupted("explorer stopped") from None
    if status:
        sys.exit(status)
