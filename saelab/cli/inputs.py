"""What eval and index both need opened: an SAE, the activations it belongs to, and the model that made them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from saelab.activations.store import ActivationStore
    from saelab.models.load import Model
    from saelab.sae.base import SAE


class Inputs(NamedTuple):
    sae_path: Path
    sae: SAE
    store: ActivationStore
    model: Model


def opened(run: Path, *, activations: Path | None, device: str | None) -> Inputs:
    """Everything checked to be whole and to fit together; ``activations`` stand in for those of the SAE's training.

    Raises:
        ArtifactError: something is missing, unfinished or damaged, or the activations are another model's.
    """
    from saelab import rundir
    from saelab.activations.store import ActivationStore
    from saelab.models.load import load_model
    from saelab.sae.io import load_sae

    sae_path = rundir.find(run, "sae")
    found = rundir.find(activations, "activations") if activations else rundir.parent(sae_path, "activations")
    store = ActivationStore.open(found)
    store.verify()
    sae = load_sae(sae_path)
    model = load_model(store.manifest.model.name, device=device)
    store.check_model(model.weights_sha256)
    return Inputs(sae_path, sae.to(model.device), store, model)
