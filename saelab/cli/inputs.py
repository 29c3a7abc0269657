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
    from saelab import rundir
    from saelab.activations.store import ActivationStore
    from saelab.models.load import load_model
    from saelab.sae.io import load_sae

    found = rundir.find(activations, "activations") if activations else rundir.parent(sae_path, "activations")
    store = ActivationStore.open(found)
    sae = load_sae(sae_path)
    if sae.metadata.model_sha256 is not None:
        store.check_model(sae.metadata.model_sha256)
    store.verify()
    model = load_model(store.manifest.model.name, device=device)
    store.check_model(model.weights_sha256)
    return Inputs(sae.to(model.device), store, model)


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
