"""The tuned lens: an affine map a layer that turns its residual stream into one that the unembedding can read.

    lens_l(x) = unembed( x + x A_l + b_l ),   A_l = 0 and b_l = 0 before training     (Belrose et al. 2023, section 3)

Early layers keep what they know in a basis of their own, which the logit lens (A = 0, b = 0) misreads. The translators
are trained so that each lens predicts the model's own next-token distribution (arXiv 2303.08112).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from saelab import atomic, rundir
from saelab.errors import ArtifactError, ConfigError
from saelab.interp.unembedding import residual_hooks
from saelab.models.hooks import canonical_hook_name, layer_of
from saelab.models.load import Model

STAGE = "lens"
WEIGHTS = "lens.safetensors"


class Translator(NamedTuple):
    """``x -> x + x @ weight + bias`` in float32."""

    weight: Float[Tensor, "d_model d_model"]
    bias: Float[Tensor, " d_model"]

    def __call__(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.direction(resid) + self.bias

    def direction(self, direction: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What a change of the residual stream along ``direction`` changes in its translation."""
        direction = direction.to(self.weight)
        return direction + direction @ self.weight


@dataclass(frozen=True)
class TunedLens:
    """The translators of one model, by hook; the residual stream that the model itself unembeds needs none."""

    translators: Mapping[str, Translator]
    model_name: str
    model_sha256: str

    @classmethod
    def identity(cls, model: Model) -> TunedLens:
        """Untrained translators, with which the tuned lens is the logit lens."""
        width = model.d_model

        def unchanged() -> Translator:
            return Translator(torch.zeros(width, width, device=model.device), torch.zeros(width, device=model.device))

        return cls({hook: unchanged() for hook in residual_hooks(model)[:-1]}, model.name, model.weights_sha256)

    def translator(self, hook_name: str) -> Translator:
        """The translator of a hook.

        Raises:
            ConfigError: there is none for it.
        """
        known = canonical_hook_name(hook_name)
        layer = layer_of(known)
        if layer and known.endswith("hook_resid_pre"):  # what one block leaves is what the next one meets
            known = f"blocks.{layer - 1}.hook_resid_post"
        if known not in self.translators:
            names = list(self.translators)
            raise ConfigError(
                f"this tuned lens has no translator for {hook_name}; it reads {names[0]} and "
                f"{names[-1].partition('.hook_')[2]} of the blocks but the last, which the model reads itself"
            )
        return self.translators[known]

    def check_model(self, model: Model) -> None:
        """Raise ArtifactError unless the lens was trained on ``model``."""
        if self.model_sha256 != model.weights_sha256:
            raise ArtifactError(
                f"the tuned lens was trained on {self.model_name} with weights {self.model_sha256[:12]}, but "
                f"{model.name} has weights {model.weights_sha256[:12]}; train one with: saelab lens --train-tuned "
                f"--model {model.name}"
            )

    def tensors(self) -> dict[str, Tensor]:
        """All weights by name, as in the file."""
        return {
            f"{hook}.{part}": value.detach().cpu().contiguous()
            for hook, translator in self.translators.items()
            for part, value in translator._asdict().items()
        }


def save_tuned_lens(lens: TunedLens, folder: Path, about: Mapping[str, Any]) -> None:
    """Write the weights and then lens.json, which names them, and ``about`` in it."""
    from safetensors.torch import save_file

    with atomic.replacing(folder / WEIGHTS) as temporary:
        save_file(lens.tensors(), temporary)
    manifest = {
        "model": {"name": lens.model_name, "sha256": lens.model_sha256},
        "hook_names": list(lens.translators),
        "weights_sha256": atomic.sha256(folder / WEIGHTS),
        **about,
    }
    atomic.write_json(folder / rundir.STAGES[STAGE], manifest)


def load_tuned_lens(path: str | os.PathLike[str], model: Model) -> TunedLens:
    """The tuned lens of a directory, or of the one such directory in a workspace, on the model's device.

    Raises:
        ArtifactError: none there, unfinished, damaged, or trained on another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = rundir.find(path, STAGE)
    try:
        about = json.loads((folder / rundir.STAGES[STAGE]).read_text("utf-8"))
        if atomic.sha256(folder / WEIGHTS) != about["weights_sha256"]:
            raise ValueError(f"{WEIGHTS} differs from its checksum")
        tensors = load_file(folder / WEIGHTS, device=str(model.device))
        lens = TunedLens(
            {hook: Translator(tensors[f"{hook}.weight"], tensors[f"{hook}.bias"]) for hook in about["hook_names"]},
            about["model"]["name"],
            about["model"]["sha256"],
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"the tuned lens in {folder} is damaged ({error}); train it again") from error
    lens.check_model(model)
    return lens
