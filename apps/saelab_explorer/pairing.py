"""The nearest feature in another SAE: by the angle of decoder rows, or by firing on the same tokens.

Nearest is not the same: with thousands of features, chance alone gives each a rather near one. The control is the same
search where nothing can match, so that a similarity can be read against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from saelab.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from scipy import sparse

    import saelab as sl
    from saelab_explorer.live import Live

#: Firings below which the correlation of two features is left open.
MIN_FIRINGS = 10

Progress = Callable[[float, str], object]


class Nearest(NamedTuple):
    """For each feature of the first SAE the nearest of the second."""

    partner: Int[np.ndarray, " features"]
    """-1 where it is not known."""
    similarity: Float[np.ndarray, " features"]
    """Cosine or correlation with it; NaN where it is not known."""


@dataclass(frozen=True)
class Pairing:
    """Nearest features of two SAEs, and what chance gives."""

    nearest: Nearest
    mutual: Bool[np.ndarray, " features"]
    """Whether the feature is also the nearest one of its partner."""
    control: Float[np.ndarray, " features"]
    """Similarity with the nearest feature where nothing can match; NaN where it is not known."""
    n_tokens: int
    """Tokens behind a correlation; 0 for cosines."""

    @property
    def known(self) -> Int[np.ndarray, " known"]:
        """Features with a partner, the most similar first."""
        known = np.flatnonzero(self.nearest.partner >= 0)
        return known[np.argsort(-self.nearest.similarity[known], kind="stable")]


def by_direction(
    first: Float[np.ndarray, "n d"],
    second: Float[np.ndarray, "m d"],
    live_first: Bool[np.ndarray, " n"],
    live_second: Bool[np.ndarray, " m"],
    *,
    seed: int = 0,
) -> Pairing:
    """Partners by cosine of decoder rows, among the live features of both.

    The control permutes the coordinates of the second SAE's rows: their lengths and spread stay, their angles do not.

    Raises:
        ConfigError: the rows have other lengths, so there are no angles, or one SAE has no live feature.
    """
    if first.shape[1] != second.shape[1]:
        raise ConfigError(
            f"the decoders write vectors of {first.shape[1]} and {second.shape[1]} numbers, which have no angle; "
            "compare by activation"
        )
    _refuse_empty(live_first, live_second)
    a, b = _unit(first[live_first]), _unit(second[live_second])
    order = np.random.default_rng(seed).permutation(b.shape[1])
    there, back = _largest(a, b), _largest(b, a)
    nearest = _spread(there, live_first, live_second)
    mutual = np.zeros(len(live_first), bool)
    mutual[live_first] = back.partner[there.partner] == np.arange(len(a))
    control = _spread(_largest(a, b[:, order]), live_first, live_second).similarity
    return Pairing(nearest, mutual, control, 0)


def by_activation(first: sparse.csr_array, second: sparse.csr_array) -> Pairing:
    """Partners by Pearson correlation of activations, of tokens x features matrices over the same tokens.

    Features that fire on fewer than ``MIN_FIRINGS`` tokens have none. The control moves the second SAE's tokens on by
    half of them, so that both are as active as before, but not on the same text.

    Raises:
        ConfigError: the matrices are not of the same tokens, or one SAE has no feature that fires often enough.
    """
    n_tokens = first.shape[0]
    if n_tokens != second.shape[0]:
        raise ConfigError(f"the activations are of {n_tokens} and {second.shape[0]} tokens; give the same text to both")
    enough_first, enough_second = (_firings(acts) >= MIN_FIRINGS for acts in (first, second))
    if not (enough_first.any() and enough_second.any()):
        raise ConfigError(
            f"no feature fires on {MIN_FIRINGS} of the {n_tokens} tokens in both SAEs; compare over more tokens"
        )
    there = _correlated(first, second, enough_first, enough_second)
    back = _correlated(second, first, enough_second, enough_first)
    known = there.partner >= 0
    mutual = np.zeros(len(known), bool)
    mutual[known] = back.partner[there.partner[known]] == np.flatnonzero(known)
    moved = second[np.roll(np.arange(n_tokens), n_tokens // 2)]
    control = _correlated(first, moved, enough_first, enough_second).similarity
    return Pairing(there, mutual, control, n_tokens)


def activations(
    first: Live, second: Live, ids: Int[np.ndarray, "rows seq"], *, progress: Progress
) -> tuple[sparse.csr_array, sparse.csr_array]:
    """Activations of both SAEs, tokens x features, on ``ids`` without their BOS; one model pass where they share one.

    Raises:
        ArtifactError: ``ids`` are no tokens of one of the models.
    """
    from scipy import sparse

    parts: tuple[list[sparse.csr_array], list[sparse.csr_array]] = ([], [])
    for n, row in enumerate(ids):
        for matrices, codes in zip(parts, _codes(first, second, row), strict=True):
            matrices.append(codes)
        progress((n + 1) / len(ids), f"reading row {n + 1} of {len(ids)}")
    return sparse.vstack(parts[0], "csr"), sparse.vstack(parts[1], "csr")


def _codes(first: Live, second: Live, row: Int[np.ndarray, " seq"]) -> Iterator[sparse.csr_array]:
    """Activations of one text, of one SAE after the other."""
    import torch
    from scipy import sparse

    if row.max() >= min(first.model.d_vocab, second.model.d_vocab):
        raise ArtifactError("the text was tokenized for another model than one of the SAEs'; compare by direction")
    ids = torch.from_numpy(row)[None]
    hooks = [live.sae.metadata.hook_name for live in (first, second)]
    with torch.inference_mode():
        if first.model is second.model:
            found = first.model.capture(ids, list(dict.fromkeys(hooks)))
            captured = [found[hook] for hook in hooks]
        else:
            captured = [
                live.model.capture(ids, [hook])[hook] for live, hook in zip((first, second), hooks, strict=True)
            ]
        keep = ids[0] != first.model.bos_id
        for live, acts in zip((first, second), captured, strict=True):
            codes = live.sae.sparse_codes(acts[0][keep].to(live.sae.device, torch.float32))
            fires = codes.values > 0
            at = (codes.rows[fires].cpu().numpy(), codes.features[fires].cpu().numpy())
            shape = (int(keep.sum()), live.sae.d_sae)
            yield sparse.csr_array((codes.values[fires].double().cpu().numpy(), at), shape=shape)


def decoder(sae: sl.SAE) -> Float[np.ndarray, "d_sae d_out"]:
    """Decoder rows; the vectors of several slots lie one after the other."""
    return sae.W_dec.detach().float().flatten(1).cpu().numpy()


def _unit(rows: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _largest(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"], *, block: int = 512) -> Nearest:
    """Largest cosine of each row of ``a``, in blocks: all cosines at once would not fit for wide SAEs."""
    partner, similarity = np.empty(len(a), np.int64), np.empty(len(a))
    for start in range(0, len(a), block):
        cosines = a[start : start + block] @ b.T
        partner[start : start + block] = cosines.argmax(1)
        similarity[start : start + block] = cosines.max(1)
    return Nearest(partner, similarity)


def _spread(nearest: Nearest, live_first: Bool[np.ndarray, " n"], live_second: Bool[np.ndarray, " m"]) -> Nearest:
    """From numbers among the live features to numbers among all."""
    partner, similarity = np.full(len(live_first), -1), np.full(len(live_first), np.nan)
    partner[live_first] = np.flatnonzero(live_second)[nearest.partner]
    similarity[live_first] = nearest.similarity
    return Nearest(partner, similarity)


def _correlated(
    first: sparse.csr_array,
    second: sparse.csr_array,
    enough_first: Bool[np.ndarray, " n"],
    enough_second: Bool[np.ndarray, " m"],
) -> Nearest:
    """Largest correlation of each column of ``first``; those that never fire together have none above 0."""
    n_tokens = first.shape[0]
    together = (first.T @ second).tocoo()
    use = enough_first[together.row] & enough_second[together.col]
    row, column, products = together.row[use], together.col[use], together.data[use]
    means, deviations = zip(*map(_moments, (first, second)), strict=True)
    covariance = products / n_tokens - means[0][row] * means[1][column]
    correlation = covariance / (deviations[0][row] * deviations[1][column])
    partner, similarity = np.full(first.shape[1], -1), np.full(first.shape[1], np.nan)
    order = np.lexsort(
        (-column, correlation)
    )  # the largest of each row is written last; a tie goes to the first column
    partner[row[order]], similarity[row[order]] = column[order], correlation[order]
    return Nearest(partner, similarity)


def _moments(acts: sparse.csr_array) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Mean and deviation of each column."""
    n_tokens = acts.shape[0]
    mean = np.asarray(acts.sum(0), np.float64).ravel() / n_tokens
    square = np.asarray(acts.multiply(acts).sum(0), np.float64).ravel() / n_tokens
    return mean, np.sqrt(np.maximum(square - mean**2, 1e-24))


def _firings(acts: sparse.csr_array) -> Int[np.ndarray, " n"]:
    return np.bincount(acts.tocoo().col, minlength=acts.shape[1])


def _refuse_empty(*live: Bool[np.ndarray, " n"]) -> None:
    if not all(one.any() for one in live):
        raise ConfigError("one of the SAEs has no feature that fired on its indexed text; choose another one")
