"""Files of SAELens before version 6: other names, settings of the model at the top level, a fine-tuning factor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.errors import ArtifactError
from saelab.sae.formats.files import shown, table

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
    "activation_fn_str_kwargs": "activation_fn_kwargs",
}
_METADATA = (
    "model_name",
    "hook_name",
    "hook_head_index",
    "model_class_name",
    "model_from_pretrained_kwargs",
    "prepend_bos",
    "exclude_special_tokens",
    "neuronpedia_id",
    "context_size",
    "seqpos_slice",
    "dataset_path",
    "hook_name_out",
    "hook_head_index_out",
    "sae_lens_training_version",
)


def is_legacy(content: dict[str, Any]) -> bool:
    """Whether the settings are those of a version before 6, by the version they give (none means before)."""
    return not _major(content).isdigit() or int(_major(content)) < 6


def _version(content: dict[str, Any]) -> Any:
    return content.get("metadata", {}).get("sae_lens_version") or content.get("sae_lens_version")


def _major(content: dict[str, Any]) -> str:
    return str(_version(content)).partition(".")[0][:9]


def upgraded(content: dict[str, Any], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The same settings in the words of version 6, and what was read in another way than written.

    Raises:
        ArtifactError: the settings mix both versions, or ask for a function that version 6 has no place for.
    """
    version = " ".join(str(_version(content) or "before 6").split())[:20]
    if "metadata" in content:
        raise ArtifactError(
            f"{path} is in the layout of SAELens {version}, yet has the table of metadata of version 6; "
            "write the sae_lens_version that made it into the metadata"
        )
    old = {_RENAMED.get(key, key): value for key, value in content.items()}
    new = {key: value for key, value in old.items() if key not in _METADATA}
    new["metadata"] = {key: old[key] for key in _METADATA if old.get(key) is not None}
    new["metadata"]["sae_lens_version"] = version
    new.setdefault("architecture", "standard")
    activation = old.get("activation_fn", "relu")
    if activation == "topk":
        if new["architecture"] not in ("standard", "topk"):
            raise ArtifactError(
                f"{path} is of architecture {shown(new['architecture'])}, yet keeps the k largest; correct it"
            )
        new["architecture"] = "topk"
        new["k"] = table(old, "activation_fn_kwargs", path).get("k")
    elif activation != "relu":
        raise ArtifactError(
            f"{path} has the activation function {shown(activation)}, which is not read; known: relu, topk"
        )
    elif new["architecture"] == "topk" and "k" not in new:
        raise ArtifactError(f"{path} is of architecture 'topk', but gives no k; put it into activation_fn_kwargs")
    if isinstance(old.get("normalize_activations"), bool):
        new["normalize_activations"] = "expected_average_only_in" if old["normalize_activations"] else "none"
    return new, (f"the settings are those of SAELens {version} and are read as version 6",)


def finetuned(path: Path, W_dec: Tensor, factor: Tensor, content: dict[str, Any]) -> Tensor:
    """``W_dec`` with the factor on each feature's activation that was fine-tuned after training.

    Raises:
        ArtifactError: the file holds such factors, but its settings say that there are none.
    """
    if factor.sub(1).abs().max() < 1e-5:
        return W_dec
    if content.get("finetuning_scaling_factor") is not True:
        raise ArtifactError(
            f"{path} holds a scaling_factor other than 1, but finetuning_scaling_factor is not set; "
            "ask its maker which of the two is meant"
        )
    return W_dec * factor[:, None]
