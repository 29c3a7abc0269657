"""Gemma Scope: params.npz of a JumpReLU SAE, and Gemma Scope 2: params.safetensors, also of (skip) transcoders.

The encoder reads ``acts`` without subtracting b_dec. The model and the hook stand only in the names of the folders.
"""

from __future__ import annotations

import math
import re
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
    read_npz,
    read_safetensors,
    shown,
)
from saelab.sae.formats.packed import Packed
from saelab.sae.formats.provenance import metadata_of
from saelab.sae.formats.weights import Read

_NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
_SKIP = "affine_skip_connection"
#: The folders of transcoders, which have no other sign where both widths are one.
_TRANSCODERS = re.compile(r"(gemma-scope-[^/]*-transcoders(/snapshots/[^/]+)?|/transcoder(_all)?)/layer_\d")
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_HOOKS_2 = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "attn.hook_z"}


def read(path: Path) -> Read:
    """The SAE in a folder or a file, params.npz or params.safetensors.

    Raises:
        ArtifactError: a file is missing or damaged, or its tensors do not fit each other or config.json.
    """
    if path.is_dir():
        path = next(file for file in (path / "params.safetensors", path / "params.npz") if file.exists())
    raw = read_npz(path) if path.suffix == ".npz" else read_safetensors(path)
    # both w_enc and W_enc occur
    tensors = {("W" + n[1:]) if n.startswith("w_") else n: t.float() if n != _SKIP else t for n, t in raw.items()}
    settings = path.with_name("config.json")
    content = read_json(settings) if path.suffix == ".safetensors" and settings.exists() else {}
    if content.get("architecture", "jump_relu") != "jump_relu":
        raise ArtifactError(
            f"{settings} has architecture {shown(content['architecture'])}, which is not read; known: jump_relu"
        )
    if len(tensors) != len(raw):
        raise ArtifactError(f"{path} holds a tensor under both spellings of its name; copy it again")
    skip = _SKIP in tensors
    check_names(path, tensors, (*_NAMES, *([_SKIP] if skip else [])), owner="an SAE of Gemma Scope")
    d_in, d_sae = matrix_shape(path, "W_enc", tensors["W_enc"])
    d_out = matrix_shape(path, "W_dec", tensors["W_dec"])[1]
    _check_shapes(path, tensors, d_in, d_sae, d_out)
    is_transcoder = (
        skip or d_in != d_out or bool(_TRANSCODERS.search(path.as_posix())) or _reads_and_writes_apart(content)
    )
    if "affine_connection" in content and bool(content["affine_connection"]) != skip:
        raise ArtifactError(
            f"{settings} has affine_connection = {shown(content['affine_connection'])}, but {path.name} holds "
            f"{'one' if skip else 'none'}; the two files belong to different SAEs"
        )

    stored = {"encoder": tensors["W_enc"].T} | {name: tensors[name] for name in _NAMES[1:]}
    folded: list[str] = []
    if _is_embedding(path):  # trained on embeddings times the root of their width, as the model scales them
        root = math.sqrt(d_in)
        stored["encoder"], stored["W_dec"] = stored["encoder"] / root, stored["W_dec"] * root
        folded.append("the embedding's scale, the root of its width, is folded into the weights")
    if is_transcoder:
        arch, cfg = (
            "transcoder",
            {"d_sae": d_sae, "activation": "jumprelu", "skip": skip} | ({"d_out": d_out} if d_out != d_in else {}),
        )
        if skip:
            stored["W_skip"] = tensors[_SKIP].T
    else:
        arch, cfg = "jumprelu", {"d_sae": d_sae}
        stored = weights.uncentred(stored)
        folded.append("b_dec, which the encoder does not subtract, is folded into its bias")
    if arch not in CONFIG_OF:
        raise ArtifactError(f"{path} is of an architecture ({arch}) that this version does not read; update saelab")
    config = weights.config_of(CONFIG_OF[arch], cfg, source=path)
    metadata = metadata_of(settings, place_of(path.parent, content), {}, {})
    return Read(weights.build(config, stored, d_in=d_in, metadata=metadata), tuple(folded))


def pack(sae: SAE) -> Packed:
    """``sae`` as params.npz; ReLU is JumpReLU with thresholds of 0.

    Raises:
        ArtifactError: an architecture whose features do not each have a threshold.
    """
    inference = weights.inference_form(sae)
    if inference.cfg.arch not in ("jumprelu", "relu", "panneal"):
        raise ArtifactError(
            f"the format gemma_scope cannot hold an SAE of architecture {sae.cfg.arch!r}: it has jumprelu, and what "
            "has a threshold for each feature; convert it to saelens"
        )
    stored = weights.recentred(weights.weights_of(inference))
    threshold = stored.get("threshold", stored["b_enc"].new_zeros(sae.d_sae))
    tensors = {"W_enc": stored["encoder"].T, "threshold": threshold}
    tensors |= {name: stored[name] for name in ("W_dec", "b_enc", "b_dec")}
    notes = [
        "b_dec, which the encoder of this format does not subtract, is folded into its bias",
        "the model, the hook and all other settings have no place in this format",
    ]
    if inference is not sae:
        notes.append(f"{sae.cfg.arch} is written as the jumprelu that it is at inference, with its threshold")
    floats = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    return Packed("params.npz", floats, None, lambda _: {}, tuple(notes))


def place_of(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Model and hook, in SAELens's words, as far as the names of the folders tell them."""
    text = str(folder)
    layer = re.search(r"layer_(\d{1,4})(?!\d)", text)
    suite = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att)", text)
    second = re.search(r"(resid_post|mlp_out|attn_out)", text)
    told: dict[str, Any] = {"model_name": content.get("model_name")}
    if suite:
        told["model_name"] = f"google/gemma-2-{suite[1]}{'-it' if suite[2] == 'it' else ''}"
        if _is_embedding(folder):
            told["hook_name"] = "hook_embed"
        elif layer:
            told["hook_name"] = f"blocks.{int(layer[1])}.{_HOOKS[suite[3]]}"
    elif second and layer:
        told["hook_name"] = f"blocks.{int(layer[1])}.{_HOOKS_2[second[1]]}"
    return told


def _reads_and_writes_apart(content: dict[str, Any]) -> bool:
    """Whether config.json names another place to write than to read."""
    written = content.get("hf_hook_point_out")
    return written is not None and written != content.get("hf_hook_point_in")


def _is_embedding(path: Path) -> bool:
    return any(part == "embedding" or part.startswith("embedding_") for part in path.parts)


def _check_shapes(path: Path, tensors: dict[str, Tensor], d_in: int, d_sae: int, d_out: int) -> None:
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), _SKIP: (d_in, d_out)}
    for name, tensor in tensors.items():
        check_tensor(path, name, tensor, shapes.get(name, (d_sae,)), told_by="W_enc")
