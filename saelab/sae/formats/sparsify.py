"""The layout of sparsify (eai-sparsify): cfg.json and sae.safetensors in a folder named after the hook point.

``pre_acts = ReLU(encoder(acts - b_dec))``, of which each token keeps the k largest or the largest of each of k groups;
a transcoder reads ``acts`` without b_dec. ``W_dec`` is [d_sae, d_in] like ours, row i the direction of feature i.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from saelab.errors import ArtifactError
from saelab.sae.architectures import CONFIG_OF
from saelab.sae.base import SAE
from saelab.sae.formats import weights
from saelab.sae.formats.files import (
    check_names,
    check_tensor,
    matrix_shape,
    read_json,
    read_safetensors,
    shown,
    whole_number,
)
from saelab.sae.formats.packed import Packed
from saelab.sae.formats.provenance import check_hash, entry, metadata_of, our_entry
from saelab.sae.formats.weights import Read

_NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
_DEFAULTS: dict[str, Any] = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": 32,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "signed": False,
}


def read(folder: Path) -> Read:
    """The SAE in ``folder``.

    Raises:
        ArtifactError: a file is missing or damaged, the settings contradict the tensors, or name an unknown activation.
    """
    path, file = folder / "cfg.json", folder / "sae.safetensors"
    content = read_json(path)
    cfg = _DEFAULTS | {name: content[name] for name in _DEFAULTS if content.get(name) is not None}
    _check_kinds(path, cfg)
    ours = our_entry(content, path)
    tensors = read_safetensors(file)
    skip, transcode = cfg["skip_connection"], cfg["transcode"]
    kind = "a skip transcoder of sparsify" if skip else "an SAE of sparsify"
    check_names(file, tensors, (*_NAMES, *(["W_skip"] if skip else [])), owner=kind)
    d_in = whole_number(content, "d_in", path)
    d_sae = cfg["num_latents"] or d_in * cfg["expansion_factor"]
    _check_shapes(file, tensors, d_in, d_sae)
    check_hash(file, ours, settings="cfg.json")

    stored = {"encoder": tensors["encoder.weight"], "b_enc": tensors["encoder.bias"]}
    stored |= {name: tensors[name] for name in ("W_dec", "b_dec", "W_skip") if name in tensors}
    folded: list[str] = []
    arch, settings = _architecture(path, cfg)
    settings |= {"d_sae": d_sae, "k": cfg["k"]}
    if arch == "transcoder":
        settings |= {"activation": "topk", "skip": skip}
        if not transcode:  # our transcoder does not subtract b_dec from its input
            stored = weights.recentred(stored)
            folded.append("b_dec, which the encoder subtracts, is folded into its bias")
    if arch not in CONFIG_OF:
        raise ArtifactError(f"{path} is of an architecture ({arch}) that this version does not read; update saelab")
    told = ours["config"]
    if told.get("arch") == arch:
        settings = {name: value for name, value in told.items() if name != "arch"} | settings
    if cfg["multi_topk"]:
        folded.append(
            "multi_topk, a loss of training for which sparsify's forward keeps 4 k, is left out: encode keeps k"
        )
    config = weights.config_of(CONFIG_OF[arch], settings, source=path)
    extra = {} if ours.get("version") else {"sparsify": {n: content[n] for n in _DEFAULTS if n in content}}
    told_place = ours if ours.get("version") else {"hook_name": hook_of(folder.name, transcode=transcode)}
    metadata = metadata_of(path, told_place, ours, extra)
    return Read(weights.build(config, stored, d_in=d_in, metadata=metadata), tuple(folded))


def pack(sae: SAE) -> Packed:
    """``sae`` in this layout.

    Raises:
        ArtifactError: it is neither TopK, AbsTopK or GroupMax nor a TopK transcoder with one width.
    """
    cfg: Any = sae.cfg
    is_transcoder = cfg.arch == "transcoder"
    fits = cfg.activation == "topk" and sae.d_out == sae.d_in if is_transcoder else cfg.arch in ("topk", "groupmax")
    if not fits:
        raise ArtifactError(
            f"the format sparsify cannot hold an SAE of architecture {cfg.arch!r}: it has topk, groupmax and topk "
            "transcoders of one width; convert it to saelens"
        )
    stored = weights.weights_of(sae)
    skip = is_transcoder and cfg.skip
    tensors = {"encoder.weight": stored["encoder"], "encoder.bias": stored["b_enc"]}
    tensors |= {name: stored[name] for name in ("W_dec", "b_dec", *(["W_skip"] if skip else []))}
    unit = bool((sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-4)

    def settings(weights_sha256: str) -> dict[str, Any]:
        return {
            "activation": "groupmax" if cfg.arch == "groupmax" else "topk",
            "expansion_factor": 32,  # stands in for num_latents where that is 0
            "normalize_decoder": unit,
            "num_latents": sae.d_sae,
            "k": cfg.k,
            "multi_topk": False,
            "skip_connection": skip,
            "transcode": is_transcoder,
            "d_in": sae.d_in,
            "saelab": entry(sae, weights_sha256),
        }

    return Packed("sae.safetensors", {n: t.contiguous() for n, t in tensors.items()}, "cfg.json", settings)


def hook_of(folder: str, *, transcode: bool) -> str | None:
    """The hook that a folder's name stands for: ``layers.5`` and ``h.5`` are outputs of blocks, ``layers.5.mlp`` of
    their MLPs; None for a name that tells no hook of ours."""
    parts = folder.split(".")
    if transcode or len(parts) not in (2, 3) or parts[0] not in ("layers", "h") or not parts[1].isdecimal():
        return None
    place = {(): "resid_post", ("mlp",): "mlp_out", ("self_attn",): "attn_out", ("attn",): "attn_out"}
    hook = place.get(tuple(parts[2:]))
    return hook and f"blocks.{int(parts[1])}.hook_{hook}"


def _check_kinds(path: Path, cfg: dict[str, Any]) -> None:
    for name, default in _DEFAULTS.items():
        if type(cfg[name]) is not type(default):
            raise ArtifactError(
                f"{path} has {name} = {shown(cfg[name])}, but it must be like {default!r}; correct the file"
            )
    for name in ("num_latents", "expansion_factor"):
        if cfg[name] < 0 or (name == "expansion_factor" and not cfg[name] and not cfg["num_latents"]):
            raise ArtifactError(f"{path} has {name} = {cfg[name]}, but it must be positive; correct the file")


def _architecture(path: Path, cfg: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    has_path = cfg["transcode"] or cfg["skip_connection"]
    if cfg["activation"] not in ("topk", "groupmax"):
        raise ArtifactError(
            f"{path} has activation {shown(cfg['activation'])}, which is not read; known: topk, groupmax"
        )
    if has_path and (cfg["signed"] or cfg["activation"] == "groupmax"):
        kind = "signed" if cfg["signed"] else "groupmax"
        raise ArtifactError(f"{path} is a {kind} transcoder, which is not read; transcoders are of activation topk")
    if cfg["signed"] and cfg["activation"] == "groupmax":
        raise ArtifactError(f"{path} is both signed and of groups, which no version of sparsify computes; correct it")
    if has_path:
        return "transcoder", {}
    return ("abstopk" if cfg["signed"] else cfg["activation"]), {}


def _check_shapes(file: Path, tensors: dict[str, Tensor], d_in: int, d_sae: int) -> None:
    rows, columns = matrix_shape(file, "encoder.weight", tensors["encoder.weight"])
    told_by = f"cfg.json (d_in={d_in}, {d_sae} latents)"
    if (rows, columns) == (d_in, d_sae) and d_in != d_sae:
        told_by += ", whose transpose this is,"
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, tensor in tensors.items():
        check_tensor(file, name, tensor, shapes.get(name, (d_in, d_in)), told_by=told_by)
