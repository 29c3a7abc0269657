"""How much of a known world an SAE recovered: directions by cosine, firing by F1."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import ShapeError
from saelab.stats import best_matching


class Recovery(NamedTuple):
    """Between 0 and 1 (cosines may be negative); 1 is perfect."""

    mean_max_cosine: float  # mean over true features of the largest cosine with any feature of the SAE
    mcc: float  # mean cosine of true features with their partners, no partner taken twice
    matched_f1: float  # mean over true features of the F1 of their partner's firing


def recovery(
    true_directions: Float[Tensor, "n_features d"],
    decoder: Float[Tensor, "d_sae d"],
    fires: Bool[Tensor, "tokens n_features"],
    found: Bool[Tensor, "found_tokens d_sae"],
    *,
    signed: bool = False,
) -> Recovery:
    """Scores of an SAE against the truth; partners by Hungarian assignment on the decoder's cosines.

    ``signed``: the SAE's activations can be negative, so that a direction and its opposite are the same feature. A true
    feature that never fires in ``fires`` does not count in the F1; one that is left without a partner (the SAE is
    narrower than the world) has cosine 0 and F1 0. Sources: Sharkey et al. 2022 for the mean max cosine; the mean
    correlation coefficient of Hyvarinen and Morioka 2016, arXiv 1605.06336, here of directions instead of signals.

    Raises:
        ShapeError: the widths or the numbers of tokens differ.
    """
    if true_directions.shape[1] != decoder.shape[1] or len(fires) != len(found):
        raise ShapeError(
            f"the truth has width {true_directions.shape[1]} and {len(fires)} tokens, but the SAE "
            f"{decoder.shape[1]} and {len(found)}; encode the same tokens"
        )
    cosines = cosine_matrix(true_directions, decoder)
    if signed:
        cosines = cosines.abs()
    partners = best_matching(cosines.double().numpy())
    left, right = torch.from_numpy(partners.left), torch.from_numpy(partners.right)
    f1 = torch.zeros(len(true_directions), dtype=torch.float64)
    f1[left] = firing_f1(fires[:, left], found[:, right])
    return Recovery(
        mean_max_cosine=float(cosines.max(1).values.mean()),
        mcc=float(cosines[left, right].sum()) / len(true_directions),
        matched_f1=float(f1[fires.any(0)].mean()),
    )


def cosine_matrix(left: Float[Tensor, "n d"], right: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Cosine of each row of ``left`` with each of ``right``; 0 for a row of zeros."""
    normalise = torch.nn.functional.normalize
    return normalise(left.detach().float(), dim=1) @ normalise(right.detach().float(), dim=1).T


def firing_f1(fires: Bool[Tensor, "tokens n"], found: Bool[Tensor, "tokens n"]) -> Float[Tensor, " n"]:
    """F1 of each column of ``found`` as a detector of the same column of ``fires``; 0 where both are always off."""
    hits = (fires & found).sum(0).double()
    return 2 * hits / (fires.sum(0) + found.sum(0)).clamp_min(1)
