"""What an SAE remembers of the activations that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from saelab.activations.capture import CacheConfig
from saelab.activations.slots import Slot
from saelab.activations.store import ActivationStore
from saelab.models.load import Model
from saelab.sae.base import Metadata, Source


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


def of_slots(slots: Sequence[Slot]) -> Metadata:
    """For a transcoder (input, target) or a crosscoder, trained on `StackedBatches` of these slots."""
    return replace(of_store(*slots[0]), sources=tuple(_source(slot) for slot in slots))


def of_difference(first: ActivationStore, second: ActivationStore, hook_name: str) -> Metadata:
    """For an SAE trained on `DifferenceBatches`, which are second minus first."""
    return replace(of_slots([Slot(first, hook_name), Slot(second, hook_name)]), reads="difference")


def _source(slot: Slot) -> Source:
    model = slot.store.manifest.model
    return Source(model_name=model.name, model_sha256=model.sha256, hook_name=slot.store.check_hook(slot.hook_name))


def of_live_capture(config: CacheConfig, model: Model, hook_name: str) -> Metadata:
    """For an SAE trained while the model ran."""
    return Metadata(
        model_name=config.model,
        model_sha256=model.weights_sha256,
        hook_name=hook_name,
        context_size=config.context,
        dataset=config.text.source,
    )
