"""A small text with planted features whose right labels are known: for tests, and for trying pages without a model.

Its activations are the feature activations themselves, so its "SAE" only lists what is above 0. Feature by feature:

    0  fires on " feet" and " foot"              4  fires at random on 30 % of the tokens
    1  fires on the token after " United"        5  never fires
    2  fires on " York" after " New" only        6  fires on a name that occurs five times
    3  fires on one document only                7, 8, ...  fire on one common word each, weakly now and then elsewhere
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab import atomic
from saelab.errors import ConfigError
from saelab.features.config import IndexConfig
from saelab.features.index import FeatureIndex, build_index

HOOK_NAME = "blocks.1.hook_resid_post"
BOS, FEET, FOOT, UNITED, NEW, YORK, NAME = range(7)
_NAMED = ("<bos>", " feet", " foot", " United", " New", " York", " Zanzibar")
_DOC_TOKENS = 150

#: The features 0 to 6 of the list above.
N_SPECIAL = 7


class PlantedCodes(NamedTuple):
    rows: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    values: Float[Tensor, " n"]


class PlantedDocument(NamedTuple):
    title: str


@dataclass(frozen=True)
class PlantedEntry:
    name: str = "planted"
    sha256: str = "0" * 64


@dataclass(frozen=True)
class PlantedManifest:
    model: PlantedEntry = PlantedEntry()


@dataclass(frozen=True)
class PlantedMetadata:
    hook_name: str = HOOK_NAME


@dataclass(frozen=True)
class PlantedStore:
    """Stands where an ActivationStore would."""

    path: Path
    planted_tokens: Int[np.ndarray, "rows context"]
    planted_docs: Int[np.ndarray, "rows context"]
    planted_acts: Float[Tensor, "rows context features"]
    manifest: PlantedManifest = PlantedManifest()
    hook_names: tuple[str, ...] = (HOOK_NAME,)

    @property
    def n_rows(self) -> int:
        return len(self.planted_tokens)

    @property
    def context(self) -> int:
        return self.planted_tokens.shape[1]

    @property
    def documents(self) -> tuple[PlantedDocument, ...]:
        return tuple(PlantedDocument(f"Document {i}") for i in range(int(self.planted_docs.max()) + 1))

    def d_in(self, hook_name: str) -> int:
        return self.planted_acts.shape[2]

    def rows(self, split: str) -> Int[np.ndarray, " n"]:
        return np.arange(self.n_rows)

    def acts(self, hook_name: str, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "n context features"]:
        return self.planted_acts[rows]

    def tokens(self, rows: Int[np.ndarray, " n"]) -> Int[Tensor, "n context"]:
        return torch.from_numpy(self.planted_tokens[rows])

    def docs(self, rows: Int[np.ndarray, " n"]) -> Int[Tensor, "n context"]:
        return torch.from_numpy(self.planted_docs[rows])


@dataclass(frozen=True)
class PlantedSAE:
    """Stands where an SAE would."""

    W_dec: Float[Tensor, "features d_model"]
    d_in: int
    metadata: PlantedMetadata = PlantedMetadata()

    def sparse_codes(self, acts: Float[Tensor, "batch features"]) -> PlantedCodes:
        rows, features = torch.nonzero(acts > 0, as_tuple=True)
        return PlantedCodes(rows, features, acts[rows, features])


@dataclass(frozen=True)
class PlantedModel:
    """Stands where a Model would, as far as building an index goes."""

    vocabulary: tuple[str, ...]
    unembed: Float[Tensor, "d_model d_vocab"]

    @property
    def d_vocab(self) -> int:
        return len(self.vocabulary)

    def final_norm_scale(self) -> None:
        return None

    def str_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.vocabulary[i] for i in ids]


class Planted(NamedTuple):
    sae: PlantedSAE
    store: PlantedStore
    model: PlantedModel


def plant(path: Path, *, seed: int = 0, n_features: int = 32, n_rows: int = 160, context: int = 64) -> Planted:
    """The text, its features and a vocabulary; ``path`` is a file that identifies them.

    Raises:
        ConfigError: too small for the seven special features.
    """
    if n_features < N_SPECIAL or n_rows * context < 10 * _DOC_TOKENS:
        raise ConfigError(
            f"a planted index needs at least {N_SPECIAL} features and {10 * _DOC_TOKENS} tokens,"
            f" got {n_features} and {n_rows * context}; raise them"
        )
    rng = np.random.default_rng(seed)
    vocabulary = _NAMED + tuple(f" word{i}" for i in range(max(64, 2 * n_features)))
    tokens = _text(rng, n_rows, context, len(vocabulary))
    docs = np.arange(tokens.size).reshape(tokens.shape) // _DOC_TOKENS
    acts = torch.from_numpy(_acts(rng, tokens, docs, n_features))
    unembed = torch.from_numpy(rng.standard_normal((n_features, len(vocabulary)))).float()
    directions = torch.from_numpy(rng.standard_normal((n_features, n_features))).float()
    W_dec = torch.nn.functional.normalize(directions, dim=1)
    atomic.write_json(path, {"seed": seed, "n_features": n_features, "n_rows": n_rows, "context": context})
    return Planted(
        PlantedSAE(W_dec, n_features),
        PlantedStore(path, tokens, docs, acts),
        PlantedModel(vocabulary, unembed),
    )


def plant_index(
    workspace: Path,
    *,
    seed: int = 0,
    n_features: int = 32,
    n_rows: int = 160,
    context: int = 64,
    config: IndexConfig | None = None,
) -> FeatureIndex:
    """Build the index of a planted text in ``workspace/index``."""
    planted = plant(workspace / "planted.json", seed=seed, n_features=n_features, n_rows=n_rows, context=context)
    return build_index(planted.sae, planted.store, planted.model, workspace / "index", config=config)  # type: ignore[arg-type]


def _text(rng: np.random.Generator, n_rows: int, context: int, d_vocab: int) -> Int[np.ndarray, "rows context"]:
    """Words by Zipf's law; the named tokens strewn in, " New" and " York" together and apart."""
    words = np.arange(len(_NAMED), d_vocab)
    frequency = 1 / (10 + np.arange(len(words)))
    tokens = rng.choice(words, size=(n_rows, context), p=frequency / frequency.sum())
    for token, share in ((FEET, 0.01), (FOOT, 0.006), (UNITED, 0.015), (NEW, 0.01), (YORK, 0.01)):
        tokens[rng.random(tokens.shape) < share] = token
    together = rng.random((n_rows, context - 1)) < 0.015
    tokens[:, :-1][together], tokens[:, 1:][together] = NEW, YORK
    tokens.reshape(-1)[rng.choice(tokens.size, 5, replace=False)] = NAME
    tokens[:, 0] = BOS
    return tokens


def _acts(
    rng: np.random.Generator,
    tokens: Int[np.ndarray, "rows context"],
    docs: Int[np.ndarray, "rows context"],
    n_features: int,
) -> Float[np.ndarray, "rows context features"]:
    before = np.roll(tokens, 1, axis=1)
    fires = np.zeros((*tokens.shape, n_features), bool)
    fires[..., 0] = (tokens == FEET) | (tokens == FOOT)
    fires[..., 1] = before == UNITED
    fires[..., 2] = (before == NEW) & (tokens == YORK)
    fires[..., 3] = docs == 3
    fires[..., 4] = rng.random(tokens.shape) < 0.3
    fires[..., 6] = tokens == NAME
    for i in range(N_SPECIAL, n_features):
        fires[..., i] = tokens == len(_NAMED) + i - N_SPECIAL
    strength = 1 + rng.exponential(size=fires.shape)
    weak = (rng.random(fires.shape) < 0.001) & (np.arange(n_features) >= N_SPECIAL)
    acts = np.where(fires, strength, np.where(weak, 0.1 * strength, 0))
    acts[:, 0] = 0
    return acts.astype(np.float32)
