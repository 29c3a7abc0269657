"""Two models on the very same tokens: what must agree before a second one reads the rows of a store."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int64

from saelab.activations.settings import CacheConfig
from saelab.activations.store import ActivationStore
from saelab.config import to_mapping
from saelab.errors import ArtifactError, ConfigError
from saelab.models.demo import NAMES as DEMO_NAMES
from saelab.models.demo import demo_model_dir
from saelab.models.load import Model

#: The name of the first store among the inputs of the second.
LIKE = "like"

#: What a second store takes from the first.
TAKEN = ("text", "tokens", "context", "held_out", "rows_per_shard")

_ROWS_AT_ONCE = 4096


def settings_of_pair(store: ActivationStore) -> dict[str, Any]:
    """Settings, as plain data, that make a store like ``store``; another model has to be named with them."""
    manifest = store.manifest
    taken = {
        "text": to_mapping(manifest.text),
        "tokens": manifest.n_tokens,
        "context": manifest.context,
        "held_out": manifest.held_out_fraction,
        "rows_per_shard": manifest.rows_per_shard,
    }
    return taken | {"hook_names": list(manifest.hook_names), "dtype": manifest.dtype}


def check_settings_of_pair(config: CacheConfig, store: ActivationStore) -> None:
    """Raise ConfigError unless ``config`` leaves to ``store`` what it takes from it."""
    given, taken = to_mapping(config), settings_of_pair(store)
    for name in TAKEN:
        if given[name] != taken[name]:
            raise ConfigError(
                f"a store like {store.path} has its {name} ({taken[name]!r}), but {given[name]!r} was asked for; "
                f"leave {name} out"
            )


def check_same_vocabulary(model: Model, store: ActivationStore) -> None:
    """Raise ArtifactError unless every token id in ``store`` means the same to ``model`` as to the store's model."""
    ids = _ids_in(store)
    name = store.manifest.model.name
    for number, ours, theirs in zip(
        ids.tolist(), _pieces(model.tokenizer, ids), _pieces(tokenizer_of(name, store), ids), strict=True
    ):
        if ours != theirs:
            raise ArtifactError(
                f"token {number} is {theirs!r} to {name}, whose tokens {store.path} holds, but {ours!r} to the model "
                "given; only models of one tokenizer can be compared token by token"
            )


def tokenizer_of(name: str, store: ActivationStore) -> Any:
    """The tokenizer of the model called ``name``, whose activations ``store`` holds.

    Raises:
        ArtifactError: it is not there any more.
    """
    from transformers import AutoTokenizer

    source = demo_model_dir() if name in DEMO_NAMES else name
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ArtifactError(
            f"{store.path} holds the tokens of {name}, whose tokenizer cannot be loaded to compare it ({reason}); "
            "put that model back where it was"
        ) from error


def _ids_in(store: ActivationStore) -> Int64[np.ndarray, " ids"]:
    """The token ids that occur in the store, ascending."""
    found = np.empty(0, np.int64)
    rows = store.rows("all")
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        found = np.union1d(found, store.tokens(rows[start : start + _ROWS_AT_ONCE]).numpy())
    return found


def _pieces(tokenizer: Any, ids: Int64[np.ndarray, " ids"]) -> list[str | None]:
    """How the vocabulary spells these tokens; None for an id that it lacks."""
    inside = ids < len(tokenizer)
    pieces = iter(tokenizer.convert_ids_to_tokens(ids[inside].tolist()))
    return [next(pieces) if known else None for known in inside]
