"""One vector a text: a model's activations, and an SAE's features, at one position or pooled over positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.errors import ConfigError, TextError
from saelab.models.load import Model
from saelab.models.tokens import behind_first, right_padded
from saelab.sae.base import SAE

Progress = Callable[[int, int, str], None]

#: Positions that have a name; besides them any whole number counts.
NAMED_POSITIONS = ("last", "mean", "max")


class PooledActs(NamedTuple):
    """What the hooks, and an SAE at one of them, make of each text."""

    acts: dict[str, Float[np.ndarray, "texts _"]]  # by hook
    feature_acts: Float[np.ndarray, "texts d_sae"] | None
    mean_norms: dict[str, float]  # mean norm of the activations over all tokens, by hook
    n_tokens: int  # tokens read, BOS not counted
    n_cut: int  # texts of which only the beginning was read


def check_position(position: str) -> None:
    """Raise ConfigError unless ``position`` is last, mean, max, or a whole number."""
    if position not in NAMED_POSITIONS and not position.removeprefix("-").isdecimal():
        raise ConfigError(
            f"position must be last, mean, max or a whole number, got {position!r}; 0 is the first token behind BOS, "
            "-1 the last"
        )


@torch.inference_mode()
def pooled_acts(
    model: Model,
    texts: Sequence[str],
    hook_names: Sequence[str],
    *,
    position: str,
    max_tokens: int,
    sae: SAE | None = None,
    batch_texts: int = 16,
    progress: Progress | None = None,
) -> PooledActs:
    """Activations of each text at ``hook_names``, and the features of ``sae`` at its own hook, all from one pass.

    ``position`` is "last"; "mean" or "max" over all tokens (of each coordinate and of each feature by itself); or the
    number of a token, from 0 behind BOS, or from the end below 0. BOS itself never counts. Of longer texts only the
    first ``max_tokens`` are read.

    Raises:
        TextError: a text without a token, or without one at the position.
        ConfigError: an unknown hook or position.
    """
    check_position(position)
    wanted = list(dict.fromkeys([*hook_names, *([sae.metadata.hook_name] if sae else [])]))
    acts = {name: torch.zeros(len(texts), model.hook_width(name)) for name in wanted}
    norms = dict.fromkeys(wanted, 0.0)
    feature_acts = torch.zeros(len(texts), sae.d_sae) if sae else None
    encoded = [model.encode(text) for text in texts]
    n_tokens, n_cut = 0, sum(len(row) > max_tokens for row in encoded)
    by_length = sorted(range(len(texts)), key=lambda i: len(encoded[i]))  # so that a batch holds little padding
    for start in range(0, len(texts), batch_texts):
        batch = by_length[start : start + batch_texts]
        rows = [[model.bos_id, *encoded[i][:max_tokens]] for i in batch]
        ids, mask = right_padded(rows, pad_id=model.pad_id)
        keep = behind_first(mask)
        chosen = keep & _at(position, keep, [texts[i] for i in batch])
        owner = chosen.nonzero()[:, 0].to(model.device)
        pool = _maxima if position == "max" else _means
        for name, seen in model.capture(ids, wanted, mask).items():
            norms[name] += float(seen[keep.to(seen.device)].float().norm(dim=-1).sum())
            at = seen[chosen.to(seen.device)].float()
            acts[name][batch] = pool(at, owner, len(rows)).cpu()
            if sae is not None and feature_acts is not None and name == sae.metadata.hook_name:
                of_features = _feature_maxima if position == "max" else _feature_means
                feature_acts[batch] = of_features(sae, at, owner, len(rows)).cpu()
        n_tokens += int(keep.sum())
        if progress:
            progress(start + len(batch), len(texts), "texts")
    return PooledActs(
        {name: values.numpy() for name, values in acts.items()},
        None if feature_acts is None else feature_acts.numpy(),
        {name: total / n_tokens for name, total in norms.items()},
        n_tokens,
        n_cut,
    )


def _at(position: str, keep: Bool[Tensor, "batch seq"], texts: Sequence[str]) -> Bool[Tensor, "batch seq"]:
    """Where the position is in each row; everywhere when all tokens are pooled."""
    lengths = keep.sum(1)
    number = -1 if position == "last" else 0 if position in NAMED_POSITIONS else int(position)
    index = torch.where(torch.tensor(number < 0), lengths + number, torch.full_like(lengths, number))
    missing = (index < 0) | (index >= lengths)
    if missing.any():
        i = int(missing.int().argmax())
        what = "has no token" if not lengths[i] else f"has {int(lengths[i])} tokens, and none at position {position}"
        raise TextError(f"{texts[i]!r} {what}; drop that text" + (" or take another position" if lengths[i] else ""))
    if position in ("mean", "max"):
        return torch.ones_like(keep)
    return keep & (keep.long().cumsum(1) == index[:, None] + 1)


def _means(values: Float[Tensor, "tokens d"], owner: Int[Tensor, " tokens"], n_rows: int) -> Float[Tensor, "rows d"]:
    counts = torch.bincount(owner, minlength=n_rows)[:, None]
    return values.new_zeros(n_rows, values.shape[1]).index_add_(0, owner, values) / counts


def _maxima(values: Float[Tensor, "tokens d"], owner: Int[Tensor, " tokens"], n_rows: int) -> Float[Tensor, "rows d"]:
    lowest = values.new_full((n_rows, values.shape[1]), -torch.inf)
    return lowest.scatter_reduce_(0, owner[:, None].expand_as(values), values, "amax")


def _feature_means(
    sae: SAE, acts: Float[Tensor, "tokens d_in"], owner: Int[Tensor, " tokens"], n_rows: int
) -> Float[Tensor, "rows d_sae"]:
    """Like `_means` of the features, but without their dense form: a token has few."""
    codes = sae.sparse_codes(acts)
    sums = torch.zeros(n_rows * sae.d_sae, device=acts.device)
    sums.index_add_(0, owner[codes.rows] * sae.d_sae + codes.features, codes.values.float())
    return sums.view(n_rows, -1) / torch.bincount(owner, minlength=n_rows)[:, None]


def _feature_maxima(
    sae: SAE, acts: Float[Tensor, "tokens d_in"], owner: Int[Tensor, " tokens"], n_rows: int
) -> Float[Tensor, "rows d_sae"]:
    return _maxima(sae.encode(acts).float(), owner, n_rows)
