"""The failures a user can cause. Each message is one sentence: what was wrong, which value, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaelabError(Exception):
    """Root of the family; the command line prints it as one line and exits with code 2."""


class ConfigError(SaelabError):
    """A setting has an unknown name, a wrong type or an impossible value."""


class ArtifactError(SaelabError):
    """A directory or file is missing, unfinished, damaged, or belongs to something else."""


class ShapeError(SaelabError):
    """Tensors do not fit each other or the model."""


class TextError(SaelabError):
    """The text cannot be used: empty, not UTF-8, too short, unknown source."""


class AssetError(SaelabError):
    """Weights or text could not be fetched."""


class TrainingError(SaelabError):
    """Training cannot go on, for example after a loss that is not a number."""


class DistributedError(SaelabError):
    """Processes that work together did not find, or have lost, each other."""


class Interrupted(SaelabError):
    """The user stopped the work; what was done is saved, and the message says how to continue (exit code 130)."""


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """A clause that names the known spellings closest to ``name``, for the end of an error sentence."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.4)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "known: " + ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
