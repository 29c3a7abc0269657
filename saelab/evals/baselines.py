"""What explained variance is worth: as many numbers a token, without an SAE.

pca         the token in the span of the r main directions of the training tokens, r = L0
coordinates the L0 coordinates furthest from their mean, and the mean for the others
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.activations.store import ActivationStore
from saelab.evals.piece import Piece, Score
from saelab.evals.reconstruction import explained, variance_sums
from saelab.stats import bootstrap

Progress = Callable[[int, int, str], None]
Reconstruct = Callable[[Float[Tensor, "tokens d_in"]], Float[Tensor, "tokens d_in"]]

_ROWS = 64  # rows of a store read at once


def baselines(
    store: ActivationStore,
    hook_name: str,
    *,
    l0: float,
    rows: Int[np.ndarray, " rows"],
    fit_tokens: int,
    draws: int,
    seed: int,
) -> Piece:
    """Explained variance of both on the held-out ``rows``, fitted on ``fit_tokens`` tokens of the training rows."""
    size = max(1, round(l0))
    train = spread(store.rows("train"), max(1, fit_tokens // (store.context - 1)))
    mean, directions = principal_directions(store, hook_name, train, n=min(size, store.d_in(hook_name)))
    scores = tuple(
        Score(
            "explained_variance",
            label,
            bootstrap(explained, _sums(store, hook_name, rows, reconstruct), draws=draws, seed=seed),
            len(rows) * (store.context - 1),
            "tokens",
        )
        for label, reconstruct in (
            (f"PCA, {size} directions for all tokens", projection(mean, directions)),
            (f"{size} coordinates of each token", largest_coordinates(mean, size)),
        )
    )
    note = (
        f"Numbers a token as the SAE's L0, rounded; fitted on {len(train) * (store.context - 1):,} training tokens. "
        "An SAE chooses its directions for each token, PCA once for all."
    )
    return Piece(name="baselines", scores=scores, notes=(note,))


def principal_directions(
    store: ActivationStore, hook_name: str, rows: Int[np.ndarray, " rows"], *, n: int
) -> tuple[Float[Tensor, " d_in"], Float[Tensor, "n d_in"]]:
    """The mean of the tokens of ``rows``, BOS left out, and the ``n`` orthonormal directions of largest variance."""
    d_in = store.d_in(hook_name)
    total, squares, count = torch.zeros(d_in).double(), torch.zeros(d_in, d_in).double(), 0
    for start in range(0, len(rows), _ROWS):
        acts = store.acts(hook_name, rows[start : start + _ROWS])[:, 1:].float().flatten(0, 1)
        total += acts.sum(0).double()
        squares += (acts.T @ acts).double()
        count += len(acts)
    mean = total / count
    directions = torch.linalg.eigh(squares / count - torch.outer(mean, mean)).eigenvectors  # ascending
    return mean.float(), directions[:, -n:].T.flip(0).float()


def projection(mean: Float[Tensor, " d_in"], directions: Float[Tensor, "n d_in"]) -> Reconstruct:
    return lambda acts: (acts - mean) @ directions.T @ directions + mean


def largest_coordinates(mean: Float[Tensor, " d_in"], n: int) -> Reconstruct:
    def reconstruct(acts: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        centred = acts - mean
        kept = centred.abs().topk(min(n, centred.shape[1]), dim=1).indices
        return torch.zeros_like(centred).scatter(1, kept, centred.gather(1, kept)) + mean

    return reconstruct


def spread(rows: Int[np.ndarray, " rows"], n: int) -> Int[np.ndarray, " n"]:
    """At most ``n`` of ``rows``, evenly spread."""
    return rows if len(rows) <= n else rows[np.linspace(0, len(rows) - 1, n).round().astype(int)]


def _sums(
    store: ActivationStore, hook_name: str, rows: Int[np.ndarray, " rows"], reconstruct: Reconstruct
) -> Float[np.ndarray, "rows columns"]:
    sums = []
    for start in range(0, len(rows), _ROWS):
        acts = store.acts(hook_name, rows[start : start + _ROWS])[:, 1:].float()
        error = (acts - reconstruct(acts.flatten(0, 1)).view_as(acts)).pow(2).sum(-1)
        sums.append(variance_sums(acts, error, torch.ones_like(error)))
    return torch.cat(sums).numpy()
