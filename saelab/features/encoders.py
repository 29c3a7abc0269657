"""Texts to vectors: by a sentence encoder, or by the language model under study itself."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from saelab.errors import AssetError, ConfigError
from saelab.models.load import Model
from saelab.models.tokens import behind_first


@runtime_checkable
class Encoder(Protocol):
    """Gives every text a vector of length 1; texts of similar content have similar ones."""

    @property
    def name(self) -> str: ...

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]: ...


class SentenceEncoder:
    """A model of the package sentence-transformers, which has to be installed."""

    def __init__(self, name: str, *, device: str | None = None) -> None:
        """Load the encoder ``name``: a directory, or a name on the Hugging Face hub.

        Raises:
            ConfigError: the package is not installed.
            AssetError: there is no such encoder.
        """
        try:
            library = import_module("sentence_transformers")
        except ImportError:
            raise ConfigError(
                "a sentence encoder needs the package sentence-transformers; install it with: "
                "pip install sentence-transformers, or use the model's own activations (--encoder model)"
            ) from None
        try:
            self._encoder: Any = library.SentenceTransformer(name, device=device)
        except (OSError, ValueError) as error:
            raise AssetError(f"the sentence encoder {name} cannot be loaded ({error}); give its directory") from error
        self.name = name

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        return np.asarray(self._encoder.encode(list(texts), normalize_embeddings=True), np.float32)


class ModelEncoder:
    """The mean activation of a text at the middle of the language model. Needs nothing else, and knows less."""

    def __init__(self, model: Model, *, batch_size: int = 32) -> None:
        self._model = model
        self._hook = f"blocks.{model.n_layers // 2}.hook_resid_post"
        self._batch_size = batch_size

    @property
    def name(self) -> str:
        return f"mean of {self._hook} of {self._model.name}"

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "texts width"]:
        means = []
        for start in range(0, len(texts), self._batch_size):
            tokens = self._model.to_tokens(list(texts[start : start + self._batch_size]))
            acts = self._model.capture(tokens.ids, [self._hook], tokens.mask)[self._hook].float()
            kept = behind_first(tokens.mask)[..., None]
            means.append(((acts * kept).sum(1) / kept.sum(1).clamp_min(1)).cpu())
        found = torch.cat(means)
        # what all texts share (a few coordinates of the residual stream are always large) would make all alike
        return torch.nn.functional.normalize(found - found.mean(0), dim=1).numpy()
