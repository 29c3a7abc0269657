"""Llama Scope: hyperparams.json and checkpoints/final.safetensors of a JumpReLU SAE or transcoder.

It was trained on ``s * acts`` with s = sqrt(d) / (average norm), one s for the input and one for the output, and has
one threshold for all features in units of raw activations, so that the features here have the threshold ``s * theta``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from saelab.errors import ArtifactError
from saelab.sae.architectures import CONFIG_OF
from saelab.sae.formats import weights
from saelab.sae.formats.files import check_names, check_tensor, read_json, read_safetensors, shown, table, whole_number
from saelab.sae.formats.provenance import metadata_of
from saelab.sae.formats.weights import Read


def read(folder: Path) -> Read:
    """The SAE in ``folder``.

    Raises:
        ArtifactError: a file is missing or damaged, or a setting contradicts the tensors or is not read.
    """
    path, file = folder / "hyperparams.json", folder / "checkpoints" / "final.safetensors"
    content = read_json(path)
    d_in, d_sae = whole_number(content, "d_model", path), whole_number(content, "d_sae", path)
    _check_read(path, content)
    norms = table(content, "dataset_average_activation_norm", path)
    scale_in = math.sqrt(d_in) / _positive(norms, "in", path)
    scale_out = math.sqrt(d_in) / _positive(norms, "out", path) if "out" in norms else scale_in

    tensors = read_safetensors(file)
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    check_names(file, tensors, names, owner="an SAE of Llama Scope")
    shapes = {"encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae), "decoder.bias": (d_in,)}
    for name, tensor in tensors.items():
        check_tensor(file, name, tensor, shapes.get(name, (d_sae,)), told_by=f"{path.name} (d_model={d_in}, {d_sae=})")
    stored = {
        "encoder": tensors["encoder.weight"].float(),
        "b_enc": tensors["encoder.bias"].float(),
        "W_dec": tensors["decoder.weight"].float().T,
        "b_dec": tensors["decoder.bias"].float(),
        "threshold": torch.full((d_sae,), _positive(content, "jump_relu_threshold", path) * scale_in),
    }
    stored = weights.scaled_input(stored, scale=scale_in, scale_out=scale_out)
    folded = [f"the input's scale {scale_in:.6g} and the output's {scale_out:.6g} are folded into the weights"]
    read_from, write_to = content.get("hook_point_in"), content.get("hook_point_out")
    if write_to not in (None, read_from):
        arch, cfg = "transcoder", {"d_sae": d_sae, "activation": "jumprelu", "skip": False}
    else:
        arch, cfg = "jumprelu", {"d_sae": d_sae}
        if not content.get("apply_decoder_bias_to_pre_encoder", False):
            stored = weights.uncentred(stored)
            folded.append("b_dec, which the encoder does not subtract, is folded into its bias")
    if arch not in CONFIG_OF:
        raise ArtifactError(f"{path} is of an architecture ({arch}) that this version does not read; update saelab")
    config = weights.config_of(CONFIG_OF[arch], cfg, source=path)
    told = {"model_name": "meta-llama/Llama-3.1-8B" if d_in == 4096 else None, "hook_name": read_from}
    extra = {"hook_name_out": write_to} if arch == "transcoder" else {}
    metadata = metadata_of(path, told, {}, extra)
    return Read(weights.build(config, stored, d_in=d_in, metadata=metadata), tuple(folded))


def _check_read(path: Path, content: dict[str, Any]) -> None:
    for name, known in (("act_fn", "jumprelu"), ("norm_activation", "dataset-wise"), ("use_decoder_bias", True)):
        if content.get(name, known) != known:
            raise ArtifactError(f"{path} has {name} = {shown(content[name])}, which is not read; known: {known}")
    subtracted = content.get("apply_decoder_bias_to_pre_encoder", False)
    apart = content.get("hook_point_in") != content.get("hook_point_out")
    if not isinstance(subtracted, bool) or (subtracted and apart):
        raise ArtifactError(
            f"{path} has apply_decoder_bias_to_pre_encoder = {shown(subtracted)}, which does not fit; correct the file"
        )


def _positive(content: dict[str, Any], name: str, path: Path) -> float:
    value = content.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ArtifactError(f"{path} has {name} = {shown(value)}, but it must be a positive number; correct the file")
    return float(value)
