"""saelab: train a model on preferences, find what the training changed feature by feature, and prove it by steering.

Names load on first use, so ``import saelab`` costs neither torch nor transformer_lens.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from saelab.errors import SaelabError

if TYPE_CHECKING:
    from saelab.activations.capture import CacheConfig, capture
    from saelab.activations.stacked import DifferenceBatches, Slot, StackedBatches
    from saelab.activations.store import ActivationStore
    from saelab.align.density import PreferredDensity, preferred_density
    from saelab.align.overopt import OveroptConfig, Overoptimisation, overoptimise
    from saelab.align.policy import PolicyConfig, load_policy
    from saelab.align.reward import load_reward_model
    from saelab.align.run import align
    from saelab.evals.reconstruction import evaluate
    from saelab.features.index import FeatureIndex, build_index, load_index
    from saelab.features.records import Example, FeatureRecord
    from saelab.features.search import TextCodes, encode_text, features_in_text, rank_features
    from saelab.interp.attribution import attribute
    from saelab.interp.lens import logit_lens
    from saelab.interp.patching import patch
    from saelab.interp.probe_data import ProbeTexts
    from saelab.interp.probe_direction import Probe
    from saelab.interp.probes import probe
    from saelab.interp.steering import Edit, steer
    from saelab.models.load import Model, load_model
    from saelab.sae.base import SAE
    from saelab.sae.io import load_sae, save_sae
    from saelab.train.config import TrainConfig
    from saelab.train.loop import train_sae

_HOME = {
    "load_model": "saelab.models.load",
    "Model": "saelab.models.load",
    "load_sae": "saelab.sae.io",
    "save_sae": "saelab.sae.io",
    "SAE": "saelab.sae.base",
    "ActivationStore": "saelab.activations.store",
    "CacheConfig": "saelab.activations.capture",
    "capture": "saelab.activations.capture",
    "Slot": "saelab.activations.stacked",
    "StackedBatches": "saelab.activations.stacked",
    "DifferenceBatches": "saelab.activations.stacked",
    "PolicyConfig": "saelab.align.policy",
    "load_policy": "saelab.align.policy",
    "load_reward_model": "saelab.align.reward",
    "align": "saelab.align.run",
    "overoptimise": "saelab.align.overopt",
    "OveroptConfig": "saelab.align.overopt",
    "Overoptimisation": "saelab.align.overopt",
    "preferred_density": "saelab.align.density",
    "PreferredDensity": "saelab.align.density",
    "TrainConfig": "saelab.train.config",
    "train_sae": "saelab.train.loop",
    "evaluate": "saelab.evals.reconstruction",
    "FeatureIndex": "saelab.features.index",
    "build_index": "saelab.features.index",
    "load_index": "saelab.features.index",
    "FeatureRecord": "saelab.features.records",
    "Example": "saelab.features.records",
    "features_in_text": "saelab.features.search",
    "encode_text": "saelab.features.search",
    "rank_features": "saelab.features.search",
    "TextCodes": "saelab.features.search",
    "logit_lens": "saelab.interp.lens",
    "attribute": "saelab.interp.attribution",
    "patch": "saelab.interp.patching",
    "probe": "saelab.interp.probes",
    "Probe": "saelab.interp.probe_direction",
    "ProbeTexts": "saelab.interp.probe_data",
    "Edit": "saelab.interp.steering",
    "steer": "saelab.interp.steering",
}

__version__ = "0.1.0"
__all__ = [*sorted(_HOME), "SaelabError"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saelab' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
