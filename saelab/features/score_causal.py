"""Does a feature do what its explanation names? Steer it, and see whether the named tokens become likelier."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.interp.steering import Edit, add_direction, add_feature, mean_norm, steer
from saelab.models.load import Model
from saelab.sae.base import Feature


class CausalEffect(NamedTuple):
    """Mean rise, in nats, of the log-probability that the next token is one of the named ones."""

    feature: float
    """When the feature is added."""
    random: float
    """When a random direction of the same norm is, the mean over several."""

    @property
    def advantage(self) -> float:
        return self.feature - self.random


def causal_effect(
    model: Model,
    feature: Feature,
    named: Sequence[int],
    tokens: Int[np.ndarray, "pieces length"],
    *,
    strength: float = 0.3,
    n_random: int = 4,
    seed: int = 0,
) -> CausalEffect:
    """Steer by ``strength`` (share of the mean residual norm) at every position but BOS of texts that do not contain
    what is named, and compare next-token probabilities with those of the unsteered model.

    Raises:
        ConfigError: the SAE does not record the mean norm of its activations.
        ValueError: no tokens are named, or no texts given.
    """
    if not len(named) or not len(tokens):
        raise ValueError(f"causal_effect needs named tokens and texts, got {len(named)} and {len(tokens)}")
    ids = torch.from_numpy(np.concatenate([np.full((len(tokens), 1), model.bos_id), tokens], 1)).long()
    generator = torch.Generator().manual_seed(seed)
    width = len(feature.direction)
    edits = [add_feature(feature, strength=strength)]
    for _ in range(n_random):
        direction = torch.randn(width, generator=generator)
        edits.append(add_direction(feature.hook_name, direction, strength=strength, mean_norm=mean_norm(feature)))
    plain = _named_logps(model, ids, named, None)
    rises = [float((_named_logps(model, ids, named, edit) - plain).mean()) for edit in edits]
    return CausalEffect(rises[0], float(np.mean(rises[1:])))


@torch.inference_mode()
def _named_logps(
    model: Model, ids: Int[Tensor, "pieces seq"], named: Sequence[int], edit: Edit | None
) -> Float[Tensor, "pieces seq_minus_1"]:
    """Log-probability that the token after each position but BOS is one of ``named``."""
    with nullcontext() if edit is None else steer(model, edit):
        logps = model.logits(ids)[:, 1:].log_softmax(-1)
    return logps[..., list(named)].logsumexp(-1)
