"""The features of one SAE that resemble a feature of another: another layer, another seed, another width.

by direction   cosine of decoder rows; both SAEs write to spaces of the same width, as layers of one model do
by use         Jaccard index of the sets of tokens on which both fire clearly, over a text that a model reads
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from saelab.errors import ConfigError, ShapeError
from saelab.features.neighbours import MIN_TOGETHER
from saelab.models.load import Model
from saelab.sae.base import SAE

#: Random directions that show how large the best of so many cosines is by chance.
_N_RANDOM = 200


class Similar(NamedTuple):
    """Best first."""

    features: Int[np.ndarray, " n"]
    scores: Float[np.ndarray, " n"]
    chance: float
    """What the best score is for nothing: by direction, the 95 % quantile of the best cosine of random directions; by
    use, that of the Jaccard index of features that fire independently at these densities."""


def by_direction(sae: SAE, feature: int, other: SAE, *, n: int = 10) -> Similar:
    """The features of ``other`` whose decoder rows have the highest cosine with that of ``feature``.

    Raises:
        ShapeError: the SAEs write vectors of different widths, or there is no such feature.
    """
    if sae.d_out != other.d_out:
        raise ShapeError(
            f"decoder rows of {sae.d_out} and of {other.d_out} numbers have no cosine;"
            " compare SAEs of one model, or by use"
        )
    _check(sae, feature)
    unit = torch.nn.functional.normalize(other.W_dec.detach().float().cpu().flatten(1), dim=1)
    direction = torch.nn.functional.normalize(sae.feature(feature).direction.float().cpu().flatten(), dim=0)
    # not torch's generator, with a seed of which an untrained SAE may have been drawn: it would find itself
    random = torch.from_numpy(np.random.default_rng(0).standard_normal((_N_RANDOM, unit.shape[1]))).float()
    best = (torch.nn.functional.normalize(random, dim=1) @ unit.T).amax(1)
    found = (unit @ direction).topk(min(n, len(unit)))
    return Similar(found.indices.numpy(), found.values.numpy(), float(best.quantile(0.95)))


@torch.inference_mode()
def by_use(
    sae: SAE, feature: int, other: SAE, model: Model, tokens: Int[np.ndarray, "rows context"], *, n: int = 10
) -> Similar:
    """The features of ``other`` that fire on the same tokens of the text, BOS left out.

    Features that fired together fewer than ``neighbours.MIN_TOGETHER`` times are left out.

    Raises:
        ShapeError: there is no such feature.
        ConfigError: the feature does not fire on this text.
    """
    _check(sae, feature)
    here, together, n_other = 0, torch.zeros(other.d_sae), torch.zeros(other.d_sae)
    hooks = [one.metadata.hook_name for one in (sae, other)]
    for start in range(0, len(tokens), 16):
        ids = torch.from_numpy(tokens[start : start + 16]).long()
        acts = model.capture(ids, list(dict.fromkeys(hooks)))
        own, theirs = (
            one.encode(acts[hook][:, 1:].float().to(one.device).flatten(0, 1)).cpu() > 0
            for one, hook in zip((sae, other), hooks, strict=True)
        )
        fires = own[:, feature]
        here += int(fires.sum())
        together += theirs[fires].sum(0)
        n_other += theirs.sum(0)
    if here == 0:
        raise ConfigError(f"feature {feature} does not fire on the {tokens.size:,} tokens read; read more of them")
    jaccard = torch.where(together >= MIN_TOGETHER, together / (here + n_other - together), torch.zeros(()))
    expected = here * n_other / (tokens.size - len(tokens))
    chance = expected / (here + n_other - expected)
    found = jaccard.topk(min(n, len(jaccard)))
    kept = found.values > 0
    return Similar(found.indices[kept].numpy(), found.values[kept].numpy(), float(chance.quantile(0.95)))


def _check(sae: SAE, feature: int) -> None:
    if not 0 <= feature < sae.d_sae:
        raise ShapeError(f"there is no feature {feature}; the SAE holds 0 to {sae.d_sae - 1}")
