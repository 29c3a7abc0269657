"""The two sides of a report on explanations: the SAE, and the same kind of SAE on the model with random weights.

Both read the same rows of the same text, so that they differ in nothing but what the model has learned.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.activations.capture import read_activations
from saelab.activations.store import ActivationStore
from saelab.features import logits
from saelab.features.codes import Codes
from saelab.features.config import IndexConfig
from saelab.features.scan import ActsByRow, Progress, scan
from saelab.models.load import Model
from saelab.sae.base import SAE

#: Promoted tokens that the explainer by logits may use.
N_PROMOTED = 64

#: Occurrences of a token from which on its mean says something.
MIN_OCCURRENCES = 5

#: What the pass keeps besides the pairs is not used here, so as little as it can.
_LITTLE = IndexConfig(n_examples=1, per_interval=1)


class Side(NamedTuple):
    """An SAE with the model that it reads, and how its activations are come by."""

    name: str
    sae: SAE
    model: Model
    acts: ActsByRow
    note: str
    """What it was trained on, for the report."""


class Scanned(NamedTuple):
    """Where the features fire in the text, as positions in it."""

    codes: Codes
    max: Float[np.ndarray, " features"]


class ReadAnew:
    """A store whose text another model reads: activations are computed when they are asked for."""

    def __init__(self, store: ActivationStore, model: Model) -> None:
        self._store = store
        self._model = model

    @property
    def path(self) -> Path:
        return self._store.path

    @property
    def context(self) -> int:
        return self._store.context

    def acts(self, hook_name: str, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "n seq d_in"]:
        tokens = self._store.tokens(rows).int().numpy()
        dtype = torch.bfloat16 if self._model.dtype == torch.bfloat16 else torch.float32
        return read_activations(self._model, tokens, [hook_name], batch_rows=16, dtype=dtype)[hook_name]


def scanned(side: Side, rows: Int[np.ndarray, " rows"], folder: Path, *, progress: Progress | None = None) -> Scanned:
    """Encode ``rows``, from where an earlier call was stopped; ``folder`` keeps the pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    found = scan(
        side.sae,
        side.acts,
        rows,
        folder,
        hook_name=side.sae.metadata.hook_name,
        settings=_LITTLE,
        chunk_rows=64,
        checkpoint_chunks=4,
        progress=progress,
    )
    return Scanned(found.codes, found.found.max)


def token_share(acts: Float[Tensor, "positions d_in"], tokens: Int[np.ndarray, " positions"]) -> float | None:
    """Share of the variance that the token alone explains: how much of it the explainers could find at best.

    1 - sum |x - m(x)|^2 / sum |x - mean|^2, with m(x) the mean of the *other* positions of the same token, over tokens
    that occur at least ``MIN_OCCURRENCES`` times. Below 0 where tokens mislead; None where no token is that frequent.
    """
    _, group, n = np.unique(tokens, return_inverse=True, return_counts=True)
    kept = n[group] >= MIN_OCCURRENCES
    if not kept.any():
        return None
    x = acts[torch.from_numpy(kept)].double().cpu()
    x = x - x.mean(0)
    groups = torch.from_numpy(group[kept])
    sums = torch.zeros(len(n), x.shape[1], dtype=torch.float64).index_add_(0, groups, x)
    others = torch.from_numpy(n[group[kept]] - 1)[:, None]
    left = (x - (sums[groups] - x) / others).square().sum()
    return 1 - float(left / x.square().sum())


def promoted_tokens(side: Side) -> Int[np.ndarray, "features n"] | None:
    """The tokens that each feature promotes, best first; None where the hook has no direct effect on the logits."""
    W_dec, W_U = side.sae.W_dec.detach(), side.model.unembed[:, : side.model.d_vocab]
    if logits.why_no_table(side.sae.metadata.hook_name, W_dec.shape[1], W_U.shape[0]):
        return None
    return logits.logit_table(W_dec, W_U, side.model.final_norm_scale(), n=N_PROMOTED).promoted_ids
