"""The layout of dictionary_learning: ae.pt, a state dict of ``torch.save``, and config.json, in a folder trainer_<i>.

``config["trainer"]["dict_class"]`` names the class; the names of the tensors must be those of that class.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saelab.errors import ArtifactError, nearest
from saelab.sae.architectures import CONFIG_OF
from saelab.sae.base import SAE
from saelab.sae.formats import weights
from saelab.sae.formats.files import check_names, check_tensor, matrix_shape, read_json, shown, table
from saelab.sae.formats.packed import Packed
from saelab.sae.formats.provenance import check_hash, entry, metadata_of, our_entry
from saelab.sae.formats.pt import read_pt
from saelab.sae.formats.weights import Read, Weights

_PLAIN = {"bias": "b_dec", "encoder.weight": "encoder", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
_NEW = {"encoder.weight": "encoder", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T", "decoder.bias": "b_dec"}
_MATRICES = {"W_enc": "encoder.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_TOPK = {"encoder.weight": "encoder", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T", "b_dec": "b_dec"}
_GATED = {
    "decoder_bias": "b_dec",
    "encoder.weight": "encoder",
    "r_mag": "r_mag",
    "gate_bias": "b_gate",
    "mag_bias": "b_mag",
    "decoder.weight": "W_dec.T",
}


class _Class(NamedTuple):
    """A dict class: its tensors under our names (.T transposed), its buffers of numbers, and our architecture."""

    tensors: dict[str, str]
    arch: str
    numbers: tuple[str, ...] = ()
    reads_uncentred: bool = False

    @property
    def names(self) -> set[str]:
        return {*self.tensors, *self.numbers}


_CLASSES = {
    "AutoEncoder": _Class(_PLAIN, "relu"),
    "AutoEncoderNew": _Class(_NEW, "relu", reads_uncentred=True),
    "GatedAutoEncoder": _Class(_GATED, "gated"),
    "JumpReluAutoEncoder": _Class(_MATRICES | {"threshold": "threshold"}, "jumprelu", reads_uncentred=True),
    "AutoEncoderTopK": _Class(_TOPK, "topk", ("k", "threshold")),
    "BatchTopKSAE": _Class(_TOPK, "batchtopk", ("k", "threshold")),
    "MatryoshkaBatchTopKSAE": _Class(_MATRICES, "matryoshka", ("k", "threshold", "group_sizes")),
}
_TRAINERS = {
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
}


def read(folder: Path) -> Read:
    """The SAE in ``folder``. Activations are those of ``load_dictionary``, which gives AutoEncoder a unit decoder.

    Raises:
        ArtifactError: a file is missing or damaged, ae.pt holds code, or config.json contradicts the tensors.
    """
    path, file = folder / "config.json", folder / "ae.pt"
    content = read_json(path) if path.exists() else {}
    trainer, ours = table(content, "trainer", path), our_entry(content, path)
    tensors = read_pt(file)
    name = _class_of(path, file, trainer, tensors)
    kind = _CLASSES[name]
    check_names(file, tensors, kind.names, owner=f"the class {name}")
    stored, d_in = _renamed(file, path, trainer, kind, tensors)
    check_hash(file, ours, settings="config.json")

    folded: list[str] = []
    if name == "AutoEncoder":
        norms = stored["W_dec"].norm(dim=1)
        if not torch.allclose(norms, torch.ones_like(norms)):
            stored = weights.unit_decoder(stored)
            folded.append("the norms of the decoder's rows are folded into the encoder, as load_dictionary does")
    if kind.reads_uncentred:
        stored = weights.uncentred(stored)
        folded.append("b_dec, which the encoder does not subtract, is folded into its bias")
    settings = _settings_of(file, path, trainer, kind, stored, tensors)
    if kind.arch not in CONFIG_OF:
        raise ArtifactError(f"{path} is of the class {name}, which this version does not read; update saelab")
    if ours["config"].get("arch") == kind.arch:
        settings = {n: v for n, v in ours["config"].items() if n != "arch"} | settings
    if "threshold" in kind.numbers and kind.arch != "topk":
        stored["threshold"] = _scalar(file, "threshold", tensors["threshold"]).to(stored["b_enc"].dtype)
        stored["n_updates"] = torch.ones((), dtype=torch.int64)
        if stored["threshold"] < 0:
            folded.append("the threshold was never set, so that every positive activation passes, as with a plain ReLU")
    config = weights.config_of(CONFIG_OF[kind.arch], settings, source=path)
    told = ours if ours.get("version") else _told(path, trainer, table(content, "buffer", path))
    extra = {} if ours.get("version") else {"dictionary_learning": {"dict_class": name}}
    metadata = metadata_of(path, told, ours, extra)
    return Read(weights.build(config, stored, d_in=d_in, metadata=metadata), tuple(folded))


def pack(sae: SAE) -> Packed:
    """``sae`` in this layout.

    Raises:
        ArtifactError: an architecture without a class here.
    """
    cfg: Any = sae.cfg
    name = {kind.arch: name for name, kind in _CLASSES.items()}.get("relu" if cfg.arch == "panneal" else cfg.arch)
    if name is None:
        held = ", ".join(sorted({kind.arch for kind in _CLASSES.values()}))
        raise ArtifactError(
            f"the format dictionary_learning cannot hold an SAE of architecture {cfg.arch!r}: it has {held}; "
            "convert it to saelens"
        )
    stored, notes = weights.weights_of(sae), []
    if name == "AutoEncoderNew":  # both hold a ReLU SAE; AutoEncoder is given a unit decoder when it is loaded
        norms = stored["W_dec"].norm(dim=1)
        name = "AutoEncoder" if torch.allclose(norms, torch.ones_like(norms)) else name
    kind = _CLASSES[name]
    if kind.reads_uncentred:
        stored = weights.recentred(stored)
        notes.append("b_dec, which the encoder of this class does not subtract, is folded into its bias")
    tensors = {theirs: _ours(stored, mine) for theirs, mine in kind.tensors.items()}
    if "k" in kind.numbers:
        tensors["k"] = torch.tensor(cfg.k, dtype=torch.int32)
        tensors["threshold"] = stored["threshold"].float() if "threshold" in stored else torch.tensor(-1.0)
    if "group_sizes" in kind.numbers:
        tensors["group_sizes"] = torch.tensor([0, *cfg.group_ends]).diff()

    def settings(weights_sha256: str) -> dict[str, Any]:
        meta = sae.metadata
        layer = next((int(part) for part in meta.hook_name.split(".") if part.isdecimal()), 0)
        trainer = {
            "trainer_class": _TRAINERS[name],
            "dict_class": name,
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            "device": "cpu",
            "layer": layer,
            "lm_name": meta.model_name,
            "submodule_name": f"{meta.hook_name.rpartition('hook_')[2]}_layer_{layer}" if meta.hook_name else None,
        }
        if "k" in kind.numbers:
            trainer["k"] = cfg.k
        buffer = {"d_submodule": sae.d_in, "ctx_len": meta.context_size, "io": "out"}
        return {"trainer": trainer, "buffer": buffer, "saelab": entry(sae, weights_sha256)}

    return Packed("ae.pt", tensors, "config.json", settings, tuple(notes))


def _class_of(path: Path, file: Path, trainer: dict[str, Any], tensors: dict[str, Any]) -> str:
    """The dict class: as config.json says, if the names of the tensors agree."""
    fitting = [name for name, kind in _CLASSES.items() if kind.names == set(tensors)]
    told = trainer.get("dict_class")
    if told is None:
        if len(fitting) != 1:
            names = " or ".join(fitting) or "none of " + ", ".join(_CLASSES)
            raise ArtifactError(f"{file} may be of the class {names}; put its config.json, which says which, beside it")
        return fitting[0]
    if not isinstance(told, str) or told not in _CLASSES:
        raise ArtifactError(f"{path} has dict_class {shown(told)}, which is not read; {nearest(str(told), _CLASSES)}")
    if told == "AutoEncoder" and fitting == ["AutoEncoderNew"]:
        return "AutoEncoderNew"  # the trainers write the one name for both
    if fitting and told not in fitting:
        raise ArtifactError(
            f"{path} has dict_class {shown(told)}, but the tensors of {file.name} are those of {' or '.join(fitting)}; "
            "the two files belong to different SAEs"
        )
    return str(told)


def _renamed(
    file: Path, path: Path, trainer: dict[str, Any], kind: _Class, tensors: dict[str, Any]
) -> tuple[Weights, int]:
    """The tensors under our names, with their shapes checked, and d_in."""
    encoder = next(name for name, ours in kind.tensors.items() if ours.startswith("encoder"))
    shape = matrix_shape(file, encoder, tensors[encoder])
    d_sae, d_in = shape if kind.tensors[encoder] == "encoder" else shape[::-1]
    for name, found in (("dict_size", d_sae), ("activation_dim", d_in)):
        if trainer.get(name, found) != found:
            raise ArtifactError(
                f"{path} has {name} = {shown(trainer[name])}, but {encoder} in {file.name} has {list(shape)}; "
                "the two files belong to different SAEs"
            )
    shapes: dict[str, Callable[[], tuple[int, ...]]] = {
        "encoder": lambda: (d_sae, d_in),
        "encoder.T": lambda: (d_in, d_sae),
        "W_dec": lambda: (d_sae, d_in),
        "W_dec.T": lambda: (d_in, d_sae),
        "b_dec": lambda: (d_in,),
    }
    stored = {}
    for theirs, ours in kind.tensors.items():
        wanted = shapes.get(ours, lambda: (d_sae,))()
        tensor = check_tensor(file, theirs, tensors[theirs], wanted, told_by=encoder)
        stored[ours.removesuffix(".T")] = tensor.T if ours.endswith(".T") else tensor
    return stored, d_in


def _ours(stored: Weights, name: str) -> Tensor:
    return stored[name.removesuffix(".T")].T.contiguous() if name.endswith(".T") else stored[name].contiguous()


def _settings_of(
    file: Path, path: Path, trainer: dict[str, Any], kind: _Class, stored: Weights, tensors: dict[str, Any]
) -> dict[str, Any]:
    settings: dict[str, Any] = {"d_sae": len(stored["encoder"])}
    if "k" in kind.numbers:
        k = tensors["k"]
        if not isinstance(k, Tensor) or k.dim() or k.is_floating_point() or k.is_complex():
            raise ArtifactError(f"{file} holds k = {str(k)[:40]}, but it must be one whole number; save the SAE again")
        settings["k"] = int(k)
        if trainer.get("k", int(k)) != int(k):
            raise ArtifactError(
                f"{path} has k = {shown(trainer['k'])}, but {file.name} holds k = {int(k)}; "
                "the two files belong to different SAEs"
            )
    if kind.arch == "relu" and not stored["b_dec"].any():
        settings["b_dec"] = "zero"
    if "group_sizes" in kind.numbers:
        settings["group_shares"] = _group_shares(file, tensors["group_sizes"], settings["d_sae"])
    return settings


def _group_shares(file: Path, group_sizes: Any, d_sae: int) -> list[float]:
    fits = isinstance(group_sizes, Tensor) and group_sizes.dim() == 1 and len(group_sizes) <= d_sae
    sizes = group_sizes.tolist() if fits and group_sizes.dtype in (torch.int32, torch.int64) else []
    if not sizes or min(sizes) < 1 or sum(sizes) != d_sae:
        raise ArtifactError(
            f"{file} holds group_sizes {str(group_sizes)[:60]}, but they must be positive and add up to {d_sae}; "
            "save the SAE again"
        )
    return [size / d_sae for size in sizes[:-1]]  # the last group is what remains


def _scalar(file: Path, name: str, value: Any) -> Tensor:
    return check_tensor(file, name, value, (), told_by="its class")


def _told(path: Path, trainer: dict[str, Any], buffer: dict[str, Any]) -> dict[str, Any]:
    """What config.json says about where the SAE belongs, in SAELens's words."""
    place, layer = trainer.get("submodule_name"), trainer.get("layer")
    hook = None
    if isinstance(place, str) and type(layer) is int:
        for prefix, name in (
            ("resid_post", "hook_resid_post"),
            ("mlp_out", "hook_mlp_out"),
            ("attn_out", "hook_attn_out"),
        ):
            if place.startswith(prefix):
                hook = f"blocks.{layer}.{name}"
    model = trainer.get("lm_name")
    return {"model_name": model or None, "hook_name": hook, "context_size": buffer.get("ctx_len")}
