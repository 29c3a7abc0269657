"""Read and write SAEs in the layout of SAELens 6: cfg.json, sae_weights.safetensors, sparsity.safetensors.

Everything is folded into the weights on the way out (normalisation) and on the way in (decoder norms, a b_dec that is
not subtracted), so a file means the same in both libraries. cfg.json is written last and holds the hash of the weights:
without it there is no SAE, and with it a damaged one is noticed.
"""

from __future__ import annotations

import json
import os
from importlib import metadata as packages
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saelab import atomic, rundir
from saelab import config as configs
from saelab.errors import ArtifactError, ConfigError, nearest
from saelab.sae.architectures import AnyConfig, new_sae
from saelab.sae.base import SAE, Metadata
from saelab.sae.batchtopk import BatchTopK
from saelab.sae.jumprelu import JumpReLUConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig

__all__ = ["load_sae", "load_sae_files", "new_sae", "save_sae"]

#: The version of SAELens whose layout this is. Files without a version of at least 6 have other keys.
LAYOUT_VERSION = "6.54.12"

_ARCHITECTURE_OF = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu"}
_VECTORS = ("W_enc", "b_enc", "W_dec", "b_dec")
_TENSORS = {"standard": _VECTORS, "topk": _VECTORS, "jumprelu": (*_VECTORS, "threshold")}


def save_sae(sae: SAE, path: str | os.PathLike[str], *, density: Float[Tensor, " d_sae"] | None = None) -> None:
    """Write ``sae`` into the directory ``path``; BatchTopK is written as the JumpReLU SAE that it is at inference.

    ``density``, the share of tokens on which each feature fires, becomes sparsity.safetensors (as log10).

    Raises:
        ArtifactError: a weight is not a finite number, the disk is full, or the directory is not writable.
    """
    path = Path(path)
    training: dict[str, Any] = {}
    if isinstance(sae, BatchTopK):
        details = configs.to_mapping(sae.cfg)
        training = {"training_architecture": details.pop("arch"), "training_architecture_details": details}
        sae = sae.as_jumprelu()
    tensors = _tensors_of(sae)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ArtifactError(
                f"{name} of the SAE for {path} holds a value that is not finite, so it is not saved; "
                "take an earlier checkpoint"
            )
    path.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path / "sae_weights.safetensors") as temporary:
        save_file(tensors, temporary)
    if density is not None:
        with atomic.replacing(path / "sparsity.safetensors") as temporary:
            save_file({"sparsity": torch.log10(density.detach().cpu().float() + 1e-10)}, temporary)
    atomic.write_json(path / "cfg.json", _header_of(sae, training, atomic.sha256(path / "sae_weights.safetensors")))


def load_sae(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> SAE:
    """The SAE at ``path``: a directory with one, or a workspace such as ``runs/demo`` that holds exactly one.

    Raises:
        ArtifactError: there is none, it is unfinished, or its files do not fit each other.
    """
    return load_sae_files(rundir.find(path, "sae"), device=device)


def load_sae_files(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> SAE:
    """The SAE whose files lie in ``path``, ready for inference: evaluation mode, no gradients, at least float32.

    Raises:
        ArtifactError: a file is missing or damaged, the architecture is unknown, a tensor is missing, superfluous, of
            another shape or not finite, or a setting contradicts the tensors.
    """
    path = Path(path)
    header = _read_header(path / "cfg.json")
    tensors = _read_tensors(path / "sae_weights.safetensors", header)
    config = _config_of(path, header, tensors)
    sae = new_sae(config, d_in=header.d_in).to(_working_dtype(tensors))
    with torch.no_grad():
        sae.encoder.copy_(tensors["W_enc"].T)
        for name in set(tensors) - {"W_enc"}:
            getattr(sae, name).copy_(tensors[name])
        _fold(sae, header)
    sae.metadata = _metadata_of(header)
    return sae.requires_grad_(False).eval().to(device)


class _Header(NamedTuple):
    """cfg.json, checked as far as it can be without the weights."""

    path: Path
    content: dict[str, Any]
    architecture: str
    d_in: int
    d_sae: int

    @property
    def metadata(self) -> dict[str, Any]:
        return self.content["metadata"]

    @property
    def ours(self) -> dict[str, Any]:
        """What saelab adds to the metadata; empty in files of other tools."""
        return self.metadata.get("saelab") or {}


def _tensors_of(sae: SAE) -> dict[str, Tensor]:
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.cfg.arch == "jumprelu":
        tensors["threshold"] = sae.get_parameter("threshold")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _header_of(sae: SAE, training: dict[str, Any], weights_sha256: str) -> dict[str, Any]:
    meta = sae.metadata
    settings = {"k": sae.cfg.k, "rescale_acts_by_decoder_norm": False} if isinstance(sae.cfg, TopKConfig) else {}
    # activations are stored flat; SAELens flattens heads itself, and only if told that there are some
    reshaped = "hook_z" if meta.hook_name.endswith("hook_z") else "none"
    return {
        "architecture": _ARCHITECTURE_OF[sae.cfg.arch],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **settings,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": reshaped,
        "metadata": {
            **meta.extra,
            "sae_lens_version": LAYOUT_VERSION,
            "model_name": meta.model_name or None,
            "hook_name": meta.hook_name or None,
            "context_size": meta.context_size,
            "dataset_path": meta.dataset,
            "prepend_bos": meta.prepend_bos,
            **training,
            "saelab": {
                "version": packages.version("saelab"),
                "config": configs.to_mapping(sae.cfg),
                "weights_sha256": weights_sha256,
                "model_sha256": meta.model_sha256,
                "mean_norm": meta.mean_norm,
                "activation_scale": meta.activation_scale,
            },
        },
    }


def _read_header(path: Path) -> _Header:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"there is no {path}; give the directory of a saved SAE") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path} is not readable as JSON ({error}); save the SAE again") from error
    if not isinstance(content, dict) or not isinstance(content.get("metadata", {}), dict):
        raise ArtifactError(f"{path} does not hold the settings of an SAE; give the directory of a saved SAE")
    content.setdefault("metadata", {})
    _check_version(path, content)
    architecture = content.get("architecture")
    if architecture not in _TENSORS:
        raise ArtifactError(
            f"{path} has architecture {architecture!r}, which this version does not read; "
            f"{nearest(str(architecture), _TENSORS)}"
        )
    for name in ("d_in", "d_sae"):
        if type(content.get(name)) is not int or content[name] < 1:
            raise ArtifactError(
                f"{path} has {name} = {content.get(name)!r}, but it must be a whole number from 1; save the SAE again"
            )
    if content.get("normalize_activations", "none") != "none":
        raise ArtifactError(
            f"{path} normalises its input by {content['normalize_activations']!r}, which is not read; "
            "fold it into the weights with the tool that made the file"
        )
    return _Header(path, content, architecture, content["d_in"], content["d_sae"])


def _check_version(path: Path, content: dict[str, Any]) -> None:
    version = content["metadata"].get("sae_lens_version") or content.get("sae_lens_version")
    major = str(version).partition(".")[0]
    if not major.isdigit() or int(major) < 6:
        raise ArtifactError(
            f"{path} is in the layout of SAELens {version or 'before 6'}; "
            "open it there and save it with SAELens 6 or later"
        )


def _read_tensors(path: Path, header: _Header) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"there is no {path}, which cfg.json beside it describes; copy it there") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path} is truncated or no safetensors file ({error}); copy it again") from error
    _check_names(path, tensors, header)
    shapes = {"W_enc": (header.d_in, header.d_sae), "W_dec": (header.d_sae, header.d_in), "b_dec": (header.d_in,)}
    for name, tensor in tensors.items():
        wanted = shapes.get(name, (header.d_sae,))
        if tuple(tensor.shape) != wanted:
            raise ArtifactError(
                f"{path} holds {name} of shape {list(tensor.shape)}, but cfg.json (d_in={header.d_in}, "
                f"d_sae={header.d_sae}) says {list(wanted)}; the two files belong to different SAEs"
            )
        if not tensor.is_floating_point():
            raise ArtifactError(
                f"{path} holds {name} as {tensor.dtype}, but weights are floating-point; save the SAE again"
            )
        if not tensor.isfinite().all():
            raise ArtifactError(f"{path} holds a value in {name} that is not finite; take an older version of it")
    expected = header.ours.get("weights_sha256")
    if expected and atomic.sha256(path) != expected:
        raise ArtifactError(
            f"{path} is damaged or not the file that cfg.json describes (its checksum differs); copy it again"
        )
    return tensors


def _check_names(path: Path, tensors: dict[str, Tensor], header: _Header) -> None:
    wanted = set(_TENSORS[header.architecture])
    missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    fitting = [name for name, names in _TENSORS.items() if set(names) == set(tensors) and name != header.architecture]
    hint = f"are these of architecture {fitting[-1]!r}?" if fitting else "the two files belong to different SAEs"
    architecture = f"architecture {header.architecture!r}"
    if missing:
        raise ArtifactError(f"{path} lacks {', '.join(missing)}, which {architecture} needs; {hint}")
    if extra:
        raise ArtifactError(f"{path} holds {', '.join(extra)}, which {architecture} does not have; {hint}")


def _config_of(path: Path, header: _Header, tensors: dict[str, Tensor]) -> AnyConfig:
    if header.architecture == "jumprelu":
        return JumpReLUConfig(d_sae=header.d_sae)
    arch: type[ReLUConfig] | type[TopKConfig] = TopKConfig if header.architecture == "topk" else ReLUConfig
    # settings of training that the layout has no place for; a file of another tool gets their defaults
    settings = {name: value for name, value in (header.ours.get("config") or {}).items() if name != "arch"}
    settings["d_sae"] = header.d_sae
    if header.architecture == "topk":
        settings["k"] = header.content.get("k")
    elif "b_dec" not in settings and not tensors["b_dec"].any():
        settings["b_dec"] = "zero"
    try:
        return configs.from_mapping(arch, settings)
    except ConfigError as error:
        raise ArtifactError(f"{path / 'cfg.json'} does not fit: {error}") from error


def _fold(sae: SAE, header: _Header) -> None:
    """Turn two options of the layout into weights that mean the same without them."""
    if header.content.get("rescale_acts_by_decoder_norm", False):
        # pre_acts are multiplied by the decoder norms before the selection, and divided by them before decoding
        norms = sae.W_dec.norm(dim=1).clamp_min(1e-8)
        sae.encoder.mul_(norms[:, None])
        sae.b_enc.mul_(norms)
        sae.W_dec.div_(norms[:, None])
    if not header.content.get("apply_b_dec_to_input", True):
        sae.b_enc.add_(sae.encoder @ sae.b_dec)


def _metadata_of(header: _Header) -> Metadata:
    known = {"sae_lens_version", "model_name", "hook_name", "context_size", "dataset_path", "prepend_bos", "saelab"}
    meta, ours = header.metadata, header.ours
    return Metadata(
        model_name=meta.get("model_name") or "",
        model_sha256=ours.get("model_sha256"),
        hook_name=meta.get("hook_name") or "",
        context_size=meta.get("context_size"),
        dataset=meta.get("dataset_path"),
        prepend_bos=bool(meta.get("prepend_bos", True)),
        mean_norm=ours.get("mean_norm"),
        activation_scale=ours.get("activation_scale"),
        extra={key: value for key, value in meta.items() if key not in known},
    )


def _working_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """Float32, or float64 where the file has it: half precision is for storage."""
    dtype = torch.float32
    for tensor in tensors.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
