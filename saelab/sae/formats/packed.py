"""An SAE laid out for writing: which files, and what is in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Packed(NamedTuple):
    """One SAE in the layout of one format. The suffix of ``weights_file`` says how tensors are stored."""

    weights_file: str
    tensors: dict[str, Tensor]
    settings_file: str | None
    """Written after the weights, so that without it there is no SAE; None for a format of weights alone."""
    settings: Callable[[str], dict[str, Any]]
    """The settings, given the hash of the weights file."""
    notes: tuple[str, ...] = ()
    """What was changed so that it means the same, and what the format has no place for."""
