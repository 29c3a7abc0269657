"""The command line. One verb a file; everything heavy is imported inside the verb, so that --help stays fast."""

from saelab.cli.app import main

__all__ = ["main"]
