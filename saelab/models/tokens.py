"""Rows of token ids with their padding, and which of their positions count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Tokens(NamedTuple):
    ids: Int[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]  # True on real tokens, False on padding


def right_padded(rows: Sequence[Sequence[int]], *, pad_id: int) -> Tokens:
    """Rows of different lengths as one tensor, the padding behind each."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.full((len(rows), int(lengths.max())), pad_id)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return Tokens(ids, torch.arange(ids.shape[1]) < lengths[:, None])


def left_padded(tokens: Tokens) -> Tokens:
    """The same rows with the padding in front, as generation needs it: a new token follows the last real one."""
    order = tokens.mask.int().argsort(dim=1, stable=True)  # padding first, then the real tokens in their order
    return Tokens(tokens.ids.gather(1, order), tokens.mask.gather(1, order))


def behind_first(mask: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """The real tokens but the first of each row: the positions that edits may change and that metrics count."""
    return mask & (mask.long().cumsum(1) > 1)
