"""What verbs need opened and checked to fit together: an SAE's model, and the activations that it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from saelab.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from saelab.activations.store import ActivationStore
    from saelab.models.load import Model
    from saelab.sae.base import SAE


class Inputs(NamedTuple):
    sae: SAE
    store: ActivationStore
    model: Model


def opened(sae_path: Path, *, activations: Path | None, device: str | None) -> Inputs:
    """Everything checked to be whole and to fit together; ``activations`` stand in for those of the SAE's training.

    Raises:
        ArtifactError: something is missing, unfinished or damaged, or the activations are another model's.
    """
    from saelab.sae.io import load_sae

    store = store_of(sae_path, activations)
    sae = load_sae(sae_path)
    if sae.metadata.model_sha256 is not None:
        store.check_model(sae.metadata.model_sha256)
    store.verify()
    model = model_of_store(store, device=device)
    return Inputs(sae.to(model.device), store, model)


def store_of(made: Path, activations: Path | None) -> ActivationStore:
    """The activations that the stage ``made`` was made from, or those that stand in for them.

    Raises:
        ArtifactError: they are missing, unfinished or damaged.
    """
    from saelab import rundir
    from saelab.activations.store import ActivationStore

    found = rundir.find(activations, "activations") if activations else rundir.parent(made, "activations")
    return ActivationStore.open(found)


def model_of_store(store: ActivationStore, *, device: str | None) -> Model:
    """The model whose activations these are.

    Raises:
        ArtifactError: the model of that name has other weights by now.
    """
    from saelab.models.load import load_model

    model = load_model(store.manifest.model.name, device=device)
    store.check_model(model.weights_sha256)
    return model


def model_and_sae(
    name: str | None, sae_path: Path | None, *, device: str | None, dtype: str | None = None
) -> tuple[Model, SAE | None]:
    """The model ``name``, or the one that the SAE was trained on, or the demo; and the SAE on its device.

    Raises:
        ConfigError, ArtifactError: see `model_of`, or there is no such SAE.
    """
    from saelab.models.load import load_model
    from saelab.sae.io import load_sae

    sae = None if sae_path is None else load_sae(sae_path)
    if sae is not None and name is None:
        model = model_of(sae, device=device, dtype=dtype)
    else:
        model = load_model(name or "demo", device=device, dtype=dtype)
    return model, None if sae is None else sae.to(model.device)


def model_of(sae: SAE, *, device: str | None, dtype: str | None = None) -> Model:
    """The model that ``sae`` was trained on, in its checkpoint's precision unless ``dtype`` is given.

    Raises:
        ConfigError: the SAE does not say which.
        ArtifactError: the model of that name has other weights by now.
    """
    from saelab.models.load import load_model

    name, trained_on = sae.metadata.model_name, sae.metadata.model_sha256
    if not name:
        raise ConfigError("the SAE does not say which model it was trained on; write model_name into its cfg.json")
    model = load_model(name, device=device, dtype=dtype)
    if trained_on is not None and trained_on != model.weights_sha256:
        raise ArtifactError(
            f"the SAE was trained on {name} with weights {trained_on[:12]}, but {name} now has weights "
            f"{model.weights_sha256[:12]}; put the old model back, or train on the new one"
        )
    return model
