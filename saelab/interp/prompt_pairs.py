"""A clean and a corrupt prompt that differ in what is to be traced, and are aligned token by token in all else."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from saelab.errors import TextError
from saelab.models.load import Model


class PromptPair(NamedTuple):
    clean: Int[Tensor, "1 seq"]
    corrupt: Int[Tensor, "1 seq"]
    differing: tuple[int, ...]
    """Positions at which the two have different tokens; before the first of them all activations are equal."""


def prompt_pair(model: Model, clean: str, corrupt: str) -> PromptPair:
    """Both prompts as token ids, each beginning with BOS.

    Raises:
        TextError: they have different numbers of tokens, are the same, or one is empty.
    """
    ours, theirs = model.to_tokens(clean).ids, model.to_tokens(corrupt).ids
    if ours.shape != theirs.shape:
        raise TextError(
            f"the clean prompt has {ours.shape[1]} tokens and the corrupt one {theirs.shape[1]}"
            f" ({_spelled(model, ours)} against {_spelled(model, theirs)}), so positions do not correspond; choose"
            " words of as many tokens"
        )
    differing = tuple(int(i) for i in (ours[0] != theirs[0]).nonzero())
    if not differing:
        raise TextError(f"the clean and the corrupt prompt are the same ({clean!r}); change what you want to trace")
    return PromptPair(ours, theirs, differing)


def _spelled(model: Model, ids: Int[Tensor, "1 seq"]) -> str:
    """The tokens behind BOS, with their borders visible."""
    return "|".join(model.str_tokens(ids[0, 1:]))
