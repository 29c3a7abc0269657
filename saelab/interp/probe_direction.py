"""A probe to keep: a direction at a hook, with what it takes to read with it and to steer along it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from saelab import atomic, rundir
from saelab import config as configs
from saelab.errors import ArtifactError, ConfigError, ShapeError
from saelab.interp.pooled_acts import pooled_acts
from saelab.interp.probe_scores import Calibration
from saelab.models.load import Model
from saelab.sae.base import SAE

SCHEMA = 1
WEIGHTS, ABOUT = "direction.safetensors", "about.json"


@dataclass(frozen=True, kw_only=True)
class About:
    """What a probe is, apart from its weights."""

    method: str
    """logistic, mean_difference, or sae_k5 for five features of an SAE."""
    hook_name: str
    position: str
    """The token of a text that it reads, or how tokens are pooled."""
    max_tokens: int
    """Of longer texts it reads the beginning."""
    classes: tuple[str, str]
    """The labels of the other and of the positive texts."""
    bias: float
    """A text is taken for positive where its score, bias included, is above 0."""
    slope: float
    """Probability of the positive class: sigmoid(slope * score + offset)."""
    offset: float
    mean_norm: float
    """Mean norm of the activations at the hook on the probe's texts: the unit of a steering strength."""
    model_name: str
    model_sha256: str | None = None


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear probe. ``direction`` points to the positive class; steering adds it at ``hook_name``.

    A dense probe reads ``acts @ direction + bias``. One on SAE features reads ``feature_acts[features] @
    feature_weights + bias``; its direction is that sum of decoder rows, what the features would add to the activations.
    """

    about: About
    direction: Float[Tensor, " d_model"]
    features: Int[Tensor, " k"] | None = None
    feature_weights: Float[Tensor, " k"] | None = None

    @property
    def hook_name(self) -> str:
        return self.about.hook_name

    @property
    def bias(self) -> float:
        return self.about.bias

    @property
    def mean_norm(self) -> float:
        return self.about.mean_norm

    @property
    def name(self) -> str:
        """Method and hook, fit for the name of a folder."""
        return f"{self.about.method}_{self.hook_name}"

    def scores(self, acts: Float[Tensor, "*batch d_model"], *, sae: SAE | None = None) -> Float[Tensor, "*batch"]:
        """The probe's score of activations at its hook; above 0 speaks for the positive class.

        Raises:
            ConfigError: the probe reads SAE features, and there is no SAE.
            ShapeError: activations of another width.
        """
        if acts.shape[-1] != len(self.direction):
            raise ShapeError(
                f"the probe reads activations of width {len(self.direction)}, got {acts.shape[-1]}; "
                f"give those of {self.hook_name} of {self.about.model_name}"
            )
        if self.features is None or self.feature_weights is None:
            return acts.float() @ self.direction.to(acts.device) + self.bias
        feature_acts = self._sae(sae).encode(acts)[..., self.features.to(acts.device)].float()
        return feature_acts @ self.feature_weights.to(acts.device) + self.bias

    def score_texts(self, model: Model, texts: Sequence[str], *, sae: SAE | None = None) -> Float[np.ndarray, " texts"]:
        """The probe's score of each text, read at the position it was trained at.

        Raises:
            ConfigError: see `scores`, or the model has no such hook.
            TextError: a text without a token at the position.
        """
        found = pooled_acts(
            model,
            texts,
            [self.hook_name],
            position=self.about.position,
            max_tokens=self.about.max_tokens,
            sae=None if self.features is None else self._sae(sae),
        )
        if self.features is None or self.feature_weights is None:
            return found.acts[self.hook_name] @ self.direction.double().numpy() + self.bias
        assert found.feature_acts is not None
        return found.feature_acts[:, self.features.numpy()] @ self.feature_weights.double().numpy() + self.bias

    def probabilities(self, scores: Float[np.ndarray, " texts"]) -> Float[np.ndarray, " texts"]:
        """Probability of the positive class, by the calibration on the training texts."""
        return Calibration(self.about.slope, self.about.offset).probabilities(scores)

    def _sae(self, sae: SAE | None) -> SAE:
        if sae is None:
            raise ConfigError(f"the probe {self.about.method} reads features of an SAE; give the SAE as well")
        return sae

    # --- files

    def save(self, directory: Path) -> None:
        """Write the weights as safetensors and the rest as JSON.

        Raises:
            ArtifactError: the directory is not writable, or the disk is full.
        """
        from safetensors.torch import save

        tensors = {"direction": self.direction.float().contiguous()}
        if self.features is not None and self.feature_weights is not None:
            tensors |= {"features": self.features, "feature_weights": self.feature_weights.float().contiguous()}
        atomic.write_bytes(directory / WEIGHTS, save(tensors))
        atomic.write_json(directory / ABOUT, {"schema": SCHEMA, **asdict(self.about)})

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """A saved probe; or, of a directory that ``saelab probe`` wrote, the one with the best validation AUROC.

        Raises:
            ArtifactError: no probe there, or a damaged one.
        """
        directory = Path(path)
        if not (directory / ABOUT).exists():
            stage = rundir.find(directory, "probe")
            directory = stage / _read_json(stage / rundir.STAGES["probe"])["best"]
        return cls._read(directory)

    @classmethod
    def _read(cls, directory: Path) -> Probe:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        plain = _read_json(directory / ABOUT)
        if plain.pop("schema", None) != SCHEMA:
            raise ArtifactError(f"{directory / ABOUT} is not of schema {SCHEMA}; make it again with: saelab probe")
        try:
            about = configs.from_mapping(About, plain)
        except ConfigError as error:
            raise ArtifactError(f"{directory / ABOUT} is damaged: {error}; make it again with: saelab probe") from error
        try:
            tensors = load_file(directory / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{directory / WEIGHTS} is not readable ({error}); make it again") from error
        if "direction" not in tensors or ("features" in tensors) != ("feature_weights" in tensors):
            raise ArtifactError(f"{directory / WEIGHTS} holds {sorted(tensors)}, and is no probe; make it again")
        return cls(about, tensors["direction"], tensors.get("features"), tensors.get("feature_weights"))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} is not readable ({error}); make it again with: saelab probe") from error
    if not isinstance(content, Mapping):
        raise ArtifactError(f"{file} holds no table; make it again with: saelab probe")
    return dict(content)
