"""Which tokens a feature makes more and less likely by itself: its direction through the unembedding.

The last residual stream x becomes logits by ``norm(x) * gain @ W_U``. The norm's division by the size of x depends on
the text, so it is left out; what is left is linear: ``effects = (W_dec[i] * gain) @ W_U``, minus the mean over the
vocabulary, which softmax does not see. Layers between the hook and the end are skipped, so this is the direct effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Effects held at a time; 128 MB in float32.
_BLOCK_EFFECTS = 1 << 25

DIRECT = "(W_dec * final norm gain) @ W_U, minus the vocabulary's mean; the norm's division and later layers omitted"

#: Random directions that show how large z is by chance.
_N_RANDOM = 256

_WRITES_TO_RESIDUAL = re.compile(r"hook_(resid_(pre|mid|post)|attn_out|mlp_out|out|embed)$")


class LogitTable(NamedTuple):
    """Strongest effects first on both sides; token id -1 where there is no table."""

    promoted_ids: Int[np.ndarray, "features n"]
    promoted_effects: Float[np.ndarray, "features n"]
    suppressed_ids: Int[np.ndarray, "features n"]
    suppressed_effects: Float[np.ndarray, "features n"]
    z: Float[np.ndarray, " features"]
    """Strongest positive effect in standard deviations over the vocabulary."""
    noise_z: float
    """What z stays below for 99 % of random directions: the strongest of so many tokens always looks strong."""


def logit_table(
    W_dec: Float[Tensor, "d_sae d_model"],
    W_U: Float[Tensor, "d_model d_vocab"],
    gain: Float[Tensor, " d_model"] | None,
    *,
    n: int,
) -> LogitTable:
    """The ``n`` most promoted and suppressed tokens of every feature; ``gain`` is that of the final norm, if any."""
    W_U = W_U.float() if gain is None else W_U.float() * gain.float()[:, None]
    noise = torch.randn(_N_RANDOM, len(W_U), generator=torch.Generator().manual_seed(0)).to(W_U)
    noise_z = torch.cat([effects.amax(1) / _spread(effects) for effects in _effects(noise, W_U)]).quantile(0.99)
    table = empty_table(len(W_dec), n)._replace(noise_z=float(noise_z))
    n, low = min(n, W_U.shape[1]), 0
    for effects in _effects(W_dec.float(), W_U):
        block = slice(low, low + len(effects))
        low = block.stop
        promoted, suppressed = effects.topk(n), effects.topk(n, largest=False)
        table.promoted_ids[block, :n], table.promoted_effects[block, :n] = promoted.indices.cpu(), promoted.values.cpu()
        table.suppressed_ids[block, :n] = suppressed.indices.cpu()
        table.suppressed_effects[block, :n] = suppressed.values.cpu()
        table.z[block] = (promoted.values[:, 0] / _spread(effects)).cpu()
    return table


def empty_table(d_sae: int, n: int) -> LogitTable:
    """For hooks whose vectors the unembedding cannot read."""
    ids, effects = np.full((d_sae, n), -1, np.int32), np.zeros((d_sae, n), np.float32)
    return LogitTable(ids, effects, ids.copy(), effects.copy(), np.zeros(d_sae, np.float32), 0.0)


def why_no_table(hook_name: str, d_out: int, d_model: int) -> str | None:
    """The reason why features of this hook have no direct effect on the logits, or None if they have one."""
    if not _WRITES_TO_RESIDUAL.search(hook_name):
        return f"none: {hook_name} does not write to the residual stream"
    if d_out != d_model:
        return f"none: the decoder writes {d_out} dimensions, the unembedding reads {d_model}"
    return None


def _effects(
    directions: Float[Tensor, "directions d_model"], W_U: Float[Tensor, "d_model d_vocab"]
) -> Iterator[Float[Tensor, "block d_vocab"]]:
    """Centred effects on the vocabulary, a block of directions at a time."""
    for block in directions.split(max(1, _BLOCK_EFFECTS // W_U.shape[1])):
        effects = block @ W_U
        yield effects.sub_(effects.mean(1, keepdim=True))


def _spread(effects: Float[Tensor, "block d_vocab"]) -> Float[Tensor, " block"]:
    """Standard deviation of effects that are centred; above 0, so that a zero direction has z = 0."""
    return effects.square().mean(1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
