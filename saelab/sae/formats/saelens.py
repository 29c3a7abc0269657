"""The layout of SAELens 6, which is also our own: cfg.json, sae_weights.safetensors, sparsity.safetensors.

An architecture that SAELens does not know stands in the same layout under its own name. Everything is folded into the
weights on the way out, so a file means the same in both libraries; on the way in, options that a file of SAELens may
still have are folded too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab import config as configs
from saelab.errors import ArtifactError, nearest
from saelab.sae.architectures import CONFIG_OF
from saelab.sae.base import SAE
from saelab.sae.formats import saelens_v5, weights
from saelab.sae.formats.files import check_tensor, read_json, read_safetensors, shown, whole_number
from saelab.sae.formats.packed import Packed
from saelab.sae.formats.provenance import check_hash, entry, metadata_of, our_entry
from saelab.sae.formats.weights import Read, Weights

#: The version of SAELens whose layout this is. Files without a version of at least 6 have other keys.
LAYOUT_VERSION = "6.54.12"

_FOUR = ("W_enc", "b_enc", "W_dec", "b_dec")


class _Layout(NamedTuple):
    """What an architecture of the layout has in its weights file, and which of ours it is."""

    tensors: tuple[str, ...]
    ours: tuple[str, ...]
    settings: Mapping[str, Any] = MappingProxyType({})
    is_transcoder: bool = False
    has_slots: bool = False


def _transcoder(*more: str, **settings: Any) -> _Layout:
    settings["skip"] = "W_skip" in more
    return _Layout((*_FOUR, *more), ("transcoder",), settings, is_transcoder=True)


def _crosscoder(*more: str, **settings: Any) -> _Layout:
    return _Layout((*_FOUR, "slot_scale", *more), ("crosscoder",), settings, has_slots=True)


# in the order in which a hint names those that have the tensors of a file
_LAYOUTS = {
    "topk": _Layout(_FOUR, ("topk",)),
    "standard": _Layout(_FOUR, ("relu", "panneal")),
    "abstopk": _Layout(_FOUR, ("abstopk",)),
    "jumprelu": _Layout((*_FOUR, "threshold"), ("jumprelu",)),
    "gated": _Layout(("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"), ("gated",)),
    "matching_pursuit": _Layout(("W_dec", "b_dec"), ("matching_pursuit",)),
    "transcoder": _transcoder(activation="relu"),
    "skip_transcoder": _transcoder("W_skip", activation="relu"),
    "jumprelu_transcoder": _transcoder("threshold", activation="jumprelu"),
    "jumprelu_skip_transcoder": _transcoder("threshold", "W_skip", activation="jumprelu"),
    # checkpoints of training, which SAELens itself exports as jumprelu
    "batchtopk": _Layout((*_FOUR, "topk_threshold"), ("jumprelu",)),
    "matryoshka_batchtopk": _Layout((*_FOUR, "topk_threshold"), ("jumprelu",)),
    # ours alone
    "groupmax": _Layout(_FOUR, ("groupmax",)),
    "topk_transcoder": _transcoder(activation="topk"),
    "topk_skip_transcoder": _transcoder("W_skip", activation="topk"),
    "crosscoder": _crosscoder(sparsity="l1"),
    "batchtopk_crosscoder": _crosscoder("threshold", sparsity="batchtopk"),
}

_SCALER = "activation_scaler.json"
_WITH_K = ("topk", "abstopk", "groupmax")
#: Normalisations that differ for each token: the reconstruction is not a function of the features any more.
_TOKEN_BY_TOKEN = ("layer_norm", "constant_norm_rescale")
#: Those whose selection SAELens can rescale by the norms of the decoder's rows; elsewhere the option means nothing.
_RESCALED = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")


def read(folder: Path) -> Read:
    """The SAE in ``folder``.

    Raises:
        ArtifactError: a file is missing or damaged, the architecture is unknown, a tensor is missing, superfluous, of
            another shape or not finite, or a setting contradicts the tensors.
    """
    header = _read_header(folder / "cfg.json")
    tensors = _read_tensors(folder / "sae_weights.safetensors", header)
    stored, folded = _folded(folder, header, tensors)
    config = _config_of(header, stored)
    known = {"sae_lens_version", "model_name", "hook_name", "hook_name_out", "context_size", "dataset_path"}
    known |= {"prepend_bos", "saelab"}
    extra = {key: value for key, value in header.metadata.items() if key not in known}
    if "topk_threshold" in tensors:
        extra.setdefault("training_architecture", header.architecture)
    metadata = metadata_of(header.path, header.metadata, header.ours, extra)
    return Read(weights.build(config, stored, d_in=header.d_in, metadata=metadata), tuple(folded))


def pack(sae: SAE) -> Packed:
    """``sae`` in this layout; a batch-wise architecture as the JumpReLU SAE that it is at inference.

    Raises:
        ArtifactError: an architecture that has no place in it.
    """
    training: dict[str, Any] = {}
    told: tuple[str, ...] = ()
    inference = weights.inference_form(sae)
    if inference is not sae:
        details = configs.to_mapping(sae.cfg)
        training = {"training_architecture": details.pop("arch"), "training_architecture_details": details}
        told = (f"{sae.cfg.arch} is written as the jumprelu that it is at inference, with its threshold",)
        sae = inference
    architecture, settings = _architecture_of(sae)
    stored = weights.weights_of(sae)
    names = _LAYOUTS[architecture].tensors
    tensors = {n: stored["encoder"].movedim(0, -1) if n == "W_enc" else stored[n] for n in names}
    return Packed(
        weights_file="sae_weights.safetensors",
        tensors={name: tensor.contiguous() for name, tensor in tensors.items()},
        settings_file="cfg.json",
        settings=lambda sha256: _settings(sae, architecture, settings, training, sha256),
        notes=told,
    )


class _Header(NamedTuple):
    """cfg.json, checked as far as it can be without the weights."""

    path: Path
    content: dict[str, Any]
    architecture: str
    d_in: int
    d_sae: int
    d_out: int
    n_slots: int
    ours: dict[str, Any]
    folded: tuple[str, ...]

    @property
    def layout(self) -> _Layout:
        return _LAYOUTS[self.architecture]

    @property
    def metadata(self) -> dict[str, Any]:
        return self.content["metadata"]

    def shape(self, tensor: str) -> tuple[int, ...]:
        slots = (self.n_slots,) if self.layout.has_slots else ()
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (*slots, self.d_in, self.d_sae),
            "W_dec": (self.d_sae, *slots, self.d_out),
            "b_dec": (*slots, self.d_out),
            "W_skip": (self.d_out, self.d_in),
            "slot_scale": slots,
            "topk_threshold": (),
        }
        if slots:
            shapes["threshold"] = ()
        return shapes.get(tensor, (self.d_sae,))


def _read_header(path: Path) -> _Header:
    content = read_json(path)
    folded: tuple[str, ...] = ()
    if not isinstance(content.get("metadata", {}), dict):
        raise ArtifactError(f"{path} does not hold the settings of an SAE; give the directory of a saved SAE")
    if saelens_v5.is_legacy(content):
        content, folded = saelens_v5.upgraded(content, path)
    content.setdefault("metadata", {})
    architecture = content.get("architecture")
    if not isinstance(architecture, str) or architecture not in _LAYOUTS:
        raise ArtifactError(
            f"{path} has architecture {shown(architecture)}, which this version does not read; "
            f"{nearest(str(architecture), _LAYOUTS)}"
        )
    d_in, d_sae = whole_number(content, "d_in", path), whole_number(content, "d_sae", path)
    d_out = whole_number(content, "d_out", path) if _LAYOUTS[architecture].is_transcoder else d_in
    n_slots = whole_number(content, "n_slots", path) if _LAYOUTS[architecture].has_slots else 1
    ours = our_entry(content["metadata"], path)
    return _Header(path, content, architecture, d_in, d_sae, d_out, n_slots, ours, folded)


def _read_tensors(path: Path, header: _Header) -> dict[str, Tensor]:
    if not path.exists():
        raise ArtifactError(f"there is no {path}, which cfg.json beside it describes; copy it there")
    tensors = read_safetensors(path)
    if "log_threshold" in tensors and "threshold" not in tensors:  # jumprelu before 6
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    finetuning = tensors.pop("scaling_factor", None)
    _check_names(path, tensors, header)
    sizes = f"cfg.json (d_in={header.d_in}, d_sae={header.d_sae})"
    for name, tensor in tensors.items():
        check_tensor(path, name, tensor, header.shape(name), told_by=sizes)
    if finetuning is not None:
        check_tensor(path, "scaling_factor", finetuning, (header.d_sae,), told_by=sizes)
        tensors["W_dec"] = saelens_v5.finetuned(path, tensors["W_dec"], finetuning, header.content)
    check_hash(path, header.ours, settings="cfg.json")
    return tensors


def _check_names(path: Path, tensors: dict[str, Tensor], header: _Header) -> None:
    wanted = set(header.layout.tensors)
    missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted)
    fitting = [name for name, layout in _LAYOUTS.items() if set(layout.tensors) == set(tensors)]
    hint = "the two files belong to different SAEs"
    if fitting and header.architecture not in fitting:
        hint = f"are these of architecture {' or '.join(map(repr, fitting[:3]))}?"
    architecture = f"architecture {header.architecture!r}"
    if missing:
        raise ArtifactError(f"{path} lacks {', '.join(missing)}, which {architecture} needs; {hint}")
    if extra:
        raise ArtifactError(f"{path} holds {', '.join(extra)[:200]}, which {architecture} does not have; {hint}")


def _folded(folder: Path, header: _Header, tensors: dict[str, Tensor]) -> tuple[Weights, list[str]]:
    """Our weights, with every option of the layout turned into weights that mean the same, and a line for each."""
    stored = {name: tensor for name, tensor in tensors.items() if name != "W_enc"}
    if "W_enc" in tensors:
        stored["encoder"] = tensors["W_enc"].movedim(-1, 0)
    folded = list(header.folded)
    rescales = header.architecture in _RESCALED and _flag(header, "rescale_acts_by_decoder_norm", default=False)
    scale = _input_scale(folder, header)
    if scale is not None:
        stored = weights.scaled_input(stored, scale=scale)
        if rescales and "topk_threshold" in stored:  # its unit is pre_acts times the norms just divided
            stored["topk_threshold"] = stored["topk_threshold"] / scale
        folded.append(f"the input's scale {scale:.6g}, from {_SCALER}, is folded into the weights")
    if rescales:
        stored = weights.unit_decoder(stored)
        folded.append("the norms of the decoder's rows, which rescale the selection, are folded into the encoder")
    if "topk_threshold" in stored:
        threshold = stored.pop("topk_threshold").to(stored["b_enc"].dtype)
        stored["threshold"] = threshold.expand(header.d_sae)
        folded.append(f"{header.architecture} is read as the jumprelu that it is at inference, with its threshold")
    if header.architecture == "batchtopk_crosscoder":
        stored["n_updates"] = torch.ones((), dtype=torch.int64)
    if not _subtracts_b_dec(header):
        if header.architecture == "matching_pursuit":  # such a file does not add b_dec either
            stored["b_dec"] = torch.zeros_like(stored["b_dec"])
        else:
            stored = weights.uncentred(stored)
        folded.append("b_dec, which the encoder does not subtract, is folded into its bias")
    return stored, folded


def _subtracts_b_dec(header: _Header) -> bool:
    """Whether the encoder reads what our architecture's does: without b_dec, except in a transcoder."""
    subtracts = _flag(header, "apply_b_dec_to_input", default=not header.layout.is_transcoder)
    if header.layout.is_transcoder and subtracts:
        raise ArtifactError(
            f"{header.path} subtracts b_dec from the input of a transcoder, whose b_dec belongs to its output; "
            "set apply_b_dec_to_input to false"
        )
    if header.layout.has_slots and not subtracts:
        raise ArtifactError(
            f"{header.path} is a crosscoder that does not subtract b_dec, which is not read; save it again"
        )
    return subtracts or header.layout.is_transcoder


def _input_scale(folder: Path, header: _Header) -> float | None:
    """The factor on the input that a checkpoint of training keeps beside it; None where the input is read as it is."""
    normalises = header.content.get("normalize_activations") or "none"
    if normalises == "expected_average_only_in" and (folder / _SCALER).exists():
        return _scale_of(folder / _SCALER, header)
    if normalises != "none":
        why = "fold it into the weights with the tool that made the file"
        if normalises in _TOKEN_BY_TOKEN:
            why = "no weights can do that, and a decoder alone cannot undo it, so take an SAE of plain activations"
        raise ArtifactError(f"{header.path} normalises its input by {shown(normalises)}, which is not read; {why}")
    return None


def _flag(header: _Header, name: str, *, default: bool) -> bool:
    value = header.content.get(name, default)
    if not isinstance(value, bool):
        raise ArtifactError(
            f"{header.path} has {name} = {shown(value)}, but it must be true or false; correct the file"
        )
    return value


def _scale_of(path: Path, header: _Header) -> float:
    scale = read_json(path).get("scaling_factor")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < float("inf"):
        raise ArtifactError(f"{path} has scaling_factor = {shown(scale)}, but it must be a positive number; correct it")
    if header.architecture == "matching_pursuit":
        raise ArtifactError(f"{path} scales the input of a matching_pursuit SAE, which is not read; save it folded")
    return float(scale)


def _config_of(header: _Header, stored: Weights) -> Any:
    """The config; settings of training that the layout has no place for come from our entry, else from defaults."""
    told = header.ours["config"]
    arch = told.get("arch", header.layout.ours[0])
    if arch not in header.layout.ours:
        raise ArtifactError(
            f"{header.path} has architecture {header.architecture!r}, but its entry of saelab says {shown(arch)}; "
            "put the original file back"
        )
    if arch not in CONFIG_OF:
        raise ArtifactError(f"{header.path} has architecture {header.architecture!r}, which this version does not read")
    settings = {name: value for name, value in told.items() if name != "arch"}
    settings |= {**header.layout.settings, "d_sae": header.d_sae}
    if header.architecture in _WITH_K or settings.get("activation") == "topk":
        settings["k"] = header.content.get("k")
    if header.architecture == "matching_pursuit":
        for theirs in ("residual_threshold", "max_iterations", "stop_on_duplicate_support"):
            if theirs in header.content:
                settings[theirs] = header.content[theirs]
    if header.layout.is_transcoder and header.d_out != header.d_in:
        settings["d_out"] = header.d_out
    if header.layout.has_slots:
        settings["n_slots"] = header.n_slots
    if arch == "relu" and "b_dec" not in settings and not stored["b_dec"].any():
        settings["b_dec"] = "zero"
    return weights.config_of(CONFIG_OF[arch], settings, source=header.path)


def _architecture_of(sae: SAE) -> tuple[str, dict[str, Any]]:
    """The name in the layout, and the settings that go with it."""
    cfg: Any = sae.cfg
    if cfg.arch == "transcoder":
        prefix = {"relu": "", "topk": "topk_", "jumprelu": "jumprelu_", "batchtopk": "jumprelu_"}[cfg.activation]
        settings = {"d_out": sae.d_out} | ({"k": cfg.k} if cfg.activation == "topk" else {})
        return f"{prefix}{'skip_' if cfg.skip else ''}transcoder", settings
    if cfg.arch == "crosscoder":
        return ("crosscoder" if cfg.sparsity == "l1" else "batchtopk_crosscoder"), {"n_slots": cfg.n_slots}
    names = [name for name, layout in _LAYOUTS.items() if cfg.arch in layout.ours]
    if not names:
        raise ArtifactError(f"the format saelens has no place for an SAE of architecture {cfg.arch!r}; choose another")
    settings = {}
    if names[0] in ("topk", "abstopk"):
        settings = {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    elif names[0] == "groupmax":
        settings = {"k": cfg.k}
    elif names[0] == "matching_pursuit":
        settings = {
            "residual_threshold": cfg.residual_threshold,
            "max_iterations": cfg.max_iterations,
            "stop_on_duplicate_support": cfg.stop_on_duplicate_support,
        }
    return names[0], settings


def _settings(
    sae: SAE, architecture: str, settings: dict[str, Any], training: dict[str, Any], weights_sha256: str
) -> dict[str, Any]:
    meta = sae.metadata
    is_transcoder = _LAYOUTS[architecture].is_transcoder
    target = {"hook_name_out": meta.sources[1].hook_name} if is_transcoder and len(meta.sources) > 1 else {}
    # activations are stored flat; SAELens flattens heads itself, and only if told that there are some
    reshaped = "hook_z" if meta.hook_name.endswith("hook_z") else "none"
    return {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **settings,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": not is_transcoder,
        "normalize_activations": "none",
        "reshape_activations": reshaped,
        "metadata": {
            **meta.extra,
            "sae_lens_version": LAYOUT_VERSION,
            "model_name": meta.model_name or None,
            "hook_name": meta.hook_name or None,
            **target,
            "context_size": meta.context_size,
            "dataset_path": meta.dataset,
            "prepend_bos": meta.prepend_bos,
            **training,
            "saelab": entry(sae, weights_sha256, whole=False),
        },
    }
