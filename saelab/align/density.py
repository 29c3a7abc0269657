"""DPO on a line: a density with a good and a bad place, and what preferring the one over the other makes of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.special import logsumexp

from saelab.errors import ConfigError


class PreferredDensity(NamedTuple):
    """Densities over ``x``; each sums to 1 over the grid times its spacing."""

    x: Float[np.ndarray, " grid"]
    reference: Float[np.ndarray, " grid"]
    policy: Float[np.ndarray, " grid"]
    reward: Float[np.ndarray, " grid"]
    """The reward that the preferences express, in nats."""
    kl: float
    """KL(policy || reference) in nats."""
    mean_reward: float


def preferred_density(
    *, good: float, bad: float, beta: float, width: float = 0.6, spread: float = 2.0, n_grid: int = 401
) -> PreferredDensity:
    """The policy that DPO reaches when answers near ``good`` beat those near ``bad``, pulled back by ``beta``.

    The reference is a normal density of deviation ``spread`` about 0, the reward a bump of height 1 at ``good`` less
    one at ``bad``. The optimum is reference * exp(reward / beta) / Z (Rafailov et al. 2023, arXiv 2305.18290, eq. 4);
    it goes to the reference as beta grows, and all onto the best place as beta goes to 0.

    Raises:
        ConfigError: beta, width or spread is not above 0, or the grid has fewer than 3 points.
    """
    for name, value in (("beta", beta), ("width", width), ("spread", spread)):
        if not value > 0:
            raise ConfigError(f"{name} must be above 0, got {value}; 0.5 is a good start")
    if n_grid < 3:
        raise ConfigError(f"the grid needs at least 3 points, got {n_grid}; 401 is usual")
    edge = 3 * spread + max(abs(good), abs(bad))
    x = np.linspace(-edge, edge, n_grid)
    spacing = x[1] - x[0]
    log_reference = -0.5 * (x / spread) ** 2
    log_reference -= logsumexp(log_reference)
    reward = np.exp(-0.5 * ((x - good) / width) ** 2) - np.exp(-0.5 * ((x - bad) / width) ** 2)
    log_policy = log_reference + reward / beta
    log_policy -= logsumexp(log_policy)
    reference, policy = np.exp(log_reference), np.exp(log_policy)
    return PreferredDensity(
        x=x,
        reference=reference / spacing,
        policy=policy / spacing,
        reward=reward,
        kl=float(policy @ (log_policy - log_reference)),
        mean_reward=float(policy @ reward),
    )
