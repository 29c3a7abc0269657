"""Would another seed find the same features? Each feature is given a partner in an SAE trained with another seed.

Source: Paulo and Belrose 2025, arXiv 2501.16615: partners by Hungarian assignment on decoder cosines, matched from 0.7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.evals.piece import Piece, Score
from saelab.evals.recovery import cosine_matrix
from saelab.sae.base import SAE
from saelab.stats import best_matching, interval_of_mean


@dataclass(frozen=True, kw_only=True)
class StabilityConfig:
    """Stability across seeds."""

    threshold: float = 0.7
    """Cosine from which two features count as the same."""
    max_features: int = 16_384
    """Wider SAEs are left out: the assignment takes memory as the square of the width, and time as its cube."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"stability.threshold must be above 0 and at most 1, got {self.threshold}; 0.7 is usual")


def stability(
    sae: SAE,
    live: Bool[Tensor, " d_sae"],
    others: Sequence[tuple[SAE, Bool[Tensor, " d_other"]]],
    config: StabilityConfig,
    *,
    draws: int,
    seed: int,
) -> Piece:
    """Of the live features of ``sae``, the share with a partner and the mean cosine with it; means over ``others``.

    ``others`` are the same SAE trained with other seeds, each with its live features. Intervals resample features.
    """
    widest = max([int(live.sum()), *(int(alive.sum()) for _, alive in others)])
    if widest > config.max_features:
        return Piece(
            name="stability",
            skipped=f"{widest:,} live features are more than stability.max_features = {config.max_features:,}, "
            "and the assignment takes time as the cube of their number",
        )
    signed = sae.cfg.arch == "abstopk"
    cosines = [
        partner_cosines(_live_directions(sae, live), _live_directions(*other), signed=signed) for other in others
    ]
    matched = np.mean([c >= config.threshold for c in cosines], axis=0)
    n = len(matched)
    scores = tuple(
        Score(metric, "", interval_of_mean(column, draws=draws, seed=seed), n, "features")
        for metric, column in (("seed_stability", matched), ("seed_cosine", np.mean(cosines, axis=0)))
    )
    seeds = "one other seed" if len(others) == 1 else f"{len(others)} other seeds"
    return Piece(name="stability", scores=scores, notes=(f"{n:,} live features against {seeds}.",))


def partner_cosines(
    directions: Float[Tensor, "n d"], others: Float[Tensor, "m d"], *, signed: bool = False
) -> Float[np.ndarray, " n"]:
    """Cosine of each direction with its partner by the best one-to-one assignment; 0 for one that is left over.

    ``signed``: opposite directions count as the same.
    """
    cosines = cosine_matrix(directions, others).double().numpy()
    if signed:
        cosines = np.abs(cosines)
    matching = best_matching(cosines)
    found = np.zeros(len(cosines))
    found[matching.left] = cosines[matching.left, matching.right]
    return found


def _live_directions(sae: SAE, live: Bool[Tensor, " d_sae"]) -> Float[Tensor, "n d_out"]:
    return sae.W_dec.detach().float().cpu()[live.cpu()]
