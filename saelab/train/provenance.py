"""What an SAE remembers of the activations that it was trained on."""

from __future__ import annotations

from saelab.activations.capture import CacheConfig
from saelab.activations.store import ActivationStore
from saelab.models.load import Model
from saelab.sae.base import Metadata


def of_store(store: ActivationStore, hook_name: str) -> Metadata:
    """For an SAE trained on a store."""
    manifest = store.manifest
    return Metadata(
        model_name=manifest.model.name,
        model_sha256=manifest.model.sha256,
        hook_name=hook_name,
        context_size=manifest.context,
        dataset=manifest.text.source,
    )


def of_live_capture(config: CacheConfig, model: Model, hook_name: str) -> Metadata:
    """For an SAE trained while the model ran."""
    return Metadata(
        model_name=config.model,
        model_sha256=model.weights_sha256,
        hook_name=hook_name,
        context_size=config.context,
        dataset=config.text.source,
    )
