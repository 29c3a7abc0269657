"""The command line, run in this process."""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

import pytest


class Result(NamedTuple):
    code: int
    out: str
    err: str


def saelab(*arguments: object) -> Result:
    """Run ``saelab ARGUMENTS`` as the console script would, and catch what it prints and its exit code."""
    from saelab.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["saelab", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        else:
            code = 0
    return Result(code, out.getvalue(), err.getvalue())
