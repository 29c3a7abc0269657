"""A map of the features: their decoder directions on a plane, by UMAP where it is installed, or by PCA.

Two dimensions of hundreds show little, and how little is measured: the share of each feature's nearest neighbours in
direction that are near on the map, beside the same for places dealt out at random.
"""

from __future__ import annotations

from html import escape
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from saelab.errors import ConfigError
from saelab.features.index import FeatureIndex

METHODS = ("pca", "umap")

#: Nearest neighbours that ``kept`` asks about.
N_NEIGHBOURS = 10

_SIZE, _MARGIN = 900, 20

#: Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = {
    "token": "#0072B2",
    "previous": "#E69F00",
    "bigram": "#009E73",
    "promotes": "#CC79A7",
    "weak": "#56B4E9",
    "none": "#999999",
    "dead": "#D55E00",
}


class DecoderMap(NamedTuple):
    method: str
    places: Float[np.ndarray, "features 2"]
    kept: float
    """Share of the nearest neighbours by cosine that are among the nearest on the map, mean over features."""
    kept_at_random: float
    """The same where the places are shuffled."""


def decoder_map(W_dec: Float[np.ndarray, "features d_out"], *, method: str | None = None, seed: int = 0) -> DecoderMap:
    """Places of the features by their unit directions; by UMAP where it is installed unless ``method`` says otherwise.

    PCA keeps the two directions of largest variance of the unit rows. UMAP: McInnes et al. 2018, arXiv 1802.03426.

    Raises:
        ConfigError: fewer than four features, an unknown method, or UMAP without its package.
    """
    if len(W_dec) < 4:
        raise ConfigError(f"a map needs at least 4 features, got {len(W_dec)}; give a larger SAE")
    chosen = method or ("umap" if find_spec("umap") else "pca")
    if chosen not in METHODS:
        raise ConfigError(f"a map is made by {' or '.join(METHODS)}, got {chosen!r}; choose one of them")
    unit = W_dec / np.maximum(np.linalg.norm(W_dec, axis=1, keepdims=True), 1e-12)
    places = _by_umap(unit, seed=seed) if chosen == "umap" else _by_pca(unit)
    shuffled = np.random.default_rng(seed).permutation(places)
    return DecoderMap(chosen, places, neighbours_kept(unit, places), neighbours_kept(unit, shuffled))


def neighbours_kept(unit: Float[np.ndarray, "features d_out"], places: Float[np.ndarray, "features 2"]) -> float:
    """Share of the ``N_NEIGHBOURS`` nearest by cosine that are among as many nearest on the map, mean over at most
    1,000 features."""
    n = min(N_NEIGHBOURS, len(unit) - 1)
    asked = np.unique(np.linspace(0, len(unit) - 1, 1000).astype(int))
    cosine = unit[asked] @ unit.T
    distance = ((places[asked][:, None] - places[None]) ** 2).sum(2)
    rows = np.arange(len(asked))
    cosine[rows, asked], distance[rows, asked] = -np.inf, np.inf
    near = np.argpartition(-cosine, n - 1, axis=1)[:, :n]
    close = np.argpartition(distance, n - 1, axis=1)[:, :n]
    return float(np.mean([len(np.intersect1d(a, b)) / n for a, b in zip(near, close, strict=True)]))


def map_svg(found: DecoderMap, index: FeatureIndex) -> str:
    """The map as a picture: a dot a feature, coloured by the kind of its label, named when pointed at."""
    low, high = found.places.min(0), found.places.max(0)
    spread = np.maximum(high - low, 1e-12)
    at = _MARGIN + (found.places - low) / spread * (_SIZE - 2 * _MARGIN)
    labels, kinds = index.column("label"), index.column("label_kind")
    dots = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{_COLOURS[kinds[i]]}" fill-opacity="0.7">'
        f"<title>{i}: {escape(str(labels[i]))}</title></circle>"
        for i, (x, y) in enumerate(at.tolist())
    ]
    return f'<svg viewBox="0 0 {_SIZE} {_SIZE}" role="img">{"".join(dots)}</svg>'


def _by_pca(unit: Float[np.ndarray, "features d_out"]) -> Float[np.ndarray, "features 2"]:
    centred = unit - unit.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    # a direction and its opposite are the same axis: the larger coordinate is to be positive
    signs = np.sign(directions[:2][np.arange(2), np.abs(directions[:2]).argmax(1)])
    return centred @ (directions[:2] * signs[:, None]).T


def _by_umap(unit: Float[np.ndarray, "features d_out"], *, seed: int) -> Float[np.ndarray, "features 2"]:
    try:
        umap = import_module("umap")
    except ImportError:
        raise ConfigError(
            "UMAP needs the package umap-learn; install it with: pip install umap-learn, or choose pca"
        ) from None
    n_neighbours = min(15, len(unit) - 1)
    return np.asarray(
        umap.UMAP(n_neighbors=n_neighbours, metric="cosine", random_state=seed).fit_transform(unit), float
    )
