"""What a patch puts in: activations of another run, zeros, their mean over texts, or those of random other texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saelab.errors import ConfigError, TextError
from saelab.interp.patch_sites import Key, Site, check_word
from saelab.models.load import Model
from saelab.models.tokens import behind_first

Ablation = Literal["zero", "mean", "resample"]

#: Tokens of each text that a mean is taken over; more texts tell more than longer ones.
MEAN_TOKENS = 256

#: For each key of the sites the values of one text: [seq, width], or [seq] for the activations of a feature.
Values = Mapping[Key, Tensor]


def readings(
    model: Model,
    ids: Int[Tensor, "batch seq"],
    sites: Iterable[Site],
    mask: Bool[Tensor, "batch seq"] | None = None,
) -> dict[Key, Tensor]:
    """What stands at the sites' hooks in a run of ``ids``: [batch, seq, width], or [batch, seq] for a feature.

    Raises:
        ConfigError: an unknown hook, or a site for a feature of an SAE that does not say where it belongs.
        ShapeError: the hook has another width than the feature's SAE.
    """
    by_key = {site.key: site for site in sites}
    acts = model.capture(ids, sorted({name for name, _ in by_key}), mask)
    return {
        key: acts[key[0]] if site.feature is None else site.feature.activation(acts[key[0]].float())
        for key, site in by_key.items()
    }


def from_run(model: Model, ids: Int[Tensor, "1 seq"], sites: Iterable[Site]) -> Values:
    """The values of another run of the model, on a prompt of the same length."""
    return {key: values[0] for key, values in readings(model, ids, sites).items()}


def ablations(
    model: Model,
    ids: Int[Tensor, "1 seq"],
    sites: Sequence[Site],
    *,
    by: Ablation,
    texts: Sequence[str] = (),
    n_draws: int = 8,
    seed: int = 0,
) -> list[Values]:
    """Values that carry nothing of the text ``ids``; of several the effects are averaged.

    ``zero``: zeros; of a feature, its activation. ``mean``: the mean over the first 256 tokens of each of ``texts``,
    BOS excepted, the same at every position. ``resample``: the values at the same positions of ``n_draws`` of the
    ``texts``, drawn with ``seed``, each cut to the length of ``ids``.

    Raises:
        ConfigError: an unknown kind, or one that needs texts without any, or texts for one that needs none.
        TextError: fewer than ``n_draws`` texts are as long as ``ids``.
    """
    check_word(by, Ablation, "an ablation")
    if (by == "zero") != (not texts):
        raise ConfigError(f"{by} ablation takes {'no' if by == 'zero' else 'other'} texts, got {len(texts)}")
    if by == "zero":
        return [{key: torch.zeros_like(values[0]) for key, values in readings(model, ids, sites).items()}]
    seq = ids.shape[1]
    if by == "mean":
        return [_means(model, texts, sites, seq=seq)]
    long = [row for text in texts if (row := model.to_tokens(text).ids[:, :seq]).shape[1] == seq]
    if not 1 <= n_draws <= len(long):
        raise TextError(
            f"resampling {n_draws} times needs as many texts of at least {seq} tokens, and of {len(texts)} texts"
            f" {len(long)} are; give more or longer texts, or lower n_draws (1 or more)"
        )
    order = torch.randperm(len(long), generator=torch.Generator().manual_seed(seed))[:n_draws]
    return [from_run(model, long[i], sites) for i in order.tolist()]


def _means(model: Model, texts: Sequence[str], sites: Sequence[Site], *, seq: int) -> Values:
    """Sums over the texts one by one, in float64, divided once by the number of tokens."""
    sums: dict[Key, Tensor] = {}
    dtypes: dict[Key, torch.dtype] = {}
    n_tokens = 0
    for text in texts:
        ids, mask = (part[:, : min(MEAN_TOKENS, model.context)] for part in model.to_tokens(text))
        counted = behind_first(mask)[0]
        n_tokens += int(counted.sum())
        for key, values in readings(model, ids, sites).items():
            sums[key] = sums.get(key, 0) + values[0, counted].double().sum(0)
            dtypes[key] = values.dtype
    if n_tokens == 0:
        raise TextError("the texts hold one token each, which is never edited; give longer ones for a mean")
    return {key: (total / n_tokens).to(dtypes[key]).expand(seq, *total.shape) for key, total in sums.items()}
