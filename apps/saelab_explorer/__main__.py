"""python -m saelab_explorer runs: what ``saelab explore`` starts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from saelab.errors import SaelabError
from saelab_explorer.launch import serve


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C; 2 and one sentence for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="saelab_explorer", description="Browse the features of trained SAEs on a local page."
    )
    parser.add_argument("root", type=Path, help="directory whose sub-directories are runs, or one run")
    parser.add_argument("--port", type=int, default=8501, help="port on this machine (0: any free one)")
    parser.add_argument("--run", help="run to open first")
    parser.add_argument("--no-open", action="store_true", help="do not open a browser")
    given = parser.parse_args(arguments)
    try:
        serve(given.root, port=given.port or None, run=given.run, open_browser=not given.no_open, started=_announce)
    except SaelabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _announce(address: str) -> None:
    print(f"explorer: {address} (Ctrl-C stops it)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
