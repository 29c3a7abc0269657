"""From the settings of a training to its data: one hook, several, or those of two stores of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence

from saelab.activations.loader import Batches
from saelab.activations.slots import Slot
from saelab.activations.stacked import DifferenceBatches, StackedBatches
from saelab.activations.store import ActivationStore, Split
from saelab.errors import ConfigError
from saelab.sae.base import Metadata
from saelab.train import provenance
from saelab.train.config import TrainConfig

StoreBatches = Batches | StackedBatches | DifferenceBatches


def the_hook(hook_names: Sequence[str], name: str | None) -> str:
    """The hook to train on: the one asked for, or the only one there is.

    Raises:
        ConfigError: it is not there, or there are several to choose from.
    """
    if name is None and len(hook_names) > 1:
        raise ConfigError(f"the activations are those of {', '.join(hook_names)}; choose one with --hook")
    if name is not None and name not in hook_names:
        raise ConfigError(
            f"the activations are not those of {name}, but of {', '.join(hook_names)}; choose one of these"
        )
    return name or hook_names[0]


def slots_of(settings: TrainConfig, store: ActivationStore, second: ActivationStore | None) -> list[Slot]:
    """The vectors of a token, in their order.

    Raises:
        ConfigError: a hook is not there, or a second store is missing or not asked for.
    """
    if (second is None) != (settings.second_store is None):
        given = "given" if second else "missing"
        raise ConfigError(
            f"a second store is {given}, but second_store is {settings.second_store!r}; use --with or --minus"
        )
    hook_name = the_hook(store.hook_names, settings.hook_name)
    hooks = [hook_name, *(the_hook(store.hook_names, hook) for hook in settings.more_hooks)]
    if second is None:
        return [Slot(store, hook) for hook in hooks]
    if len(hooks) > 1:
        raise ConfigError(f"two stores are compared at one hook, not at {', '.join(hooks)}; give --hook once")
    return [Slot(store, hook_name), Slot(second, hook_name)]


def batches_of(
    settings: TrainConfig, store: ActivationStore, second: ActivationStore | None = None, *, split: Split = "train"
) -> StoreBatches:
    """The stream that ``settings`` describe.

    Raises:
        ConfigError, ShapeError, ArtifactError, TextError: as the classes of batches.
    """
    slots = slots_of(settings, store, second)
    shared = {"batch_size": settings.batch_size, "seed": settings.seed, "outlier_factor": settings.outlier_factor}
    if settings.second_store == "subtracted":
        assert second is not None  # slots_of saw to that
        return DifferenceBatches(second, store, slots[0].hook_name, split=split, **shared)  # type: ignore[arg-type]
    if len(slots) > 1:
        return StackedBatches(slots, split=split, **shared)  # type: ignore[arg-type]
    return Batches(*slots[0], split=split, **shared)  # type: ignore[arg-type]


def metadata_of(settings: TrainConfig, store: ActivationStore, second: ActivationStore | None = None) -> Metadata:
    """What the SAE shall remember of them."""
    slots = slots_of(settings, store, second)
    if settings.second_store == "subtracted":
        assert second is not None
        return provenance.of_difference(second, store, slots[0].hook_name)
    return provenance.of_store(*slots[0]) if len(slots) == 1 else provenance.of_slots(slots)
