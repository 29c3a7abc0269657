"""SAEs of every architecture with all weights their own, and files of other tools as their layout is documented."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from saelab.sae.abstopk import AbsTopKConfig
from saelab.sae.base import SAE, Metadata
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.crosscoder import CrosscoderConfig
from saelab.sae.gated import GatedConfig
from saelab.sae.groupmax import GroupMaxConfig
from saelab.sae.io import new_sae
from saelab.sae.jumprelu import JumpReLUConfig
from saelab.sae.matching_pursuit import MatchingPursuitConfig
from saelab.sae.matryoshka import MatryoshkaConfig
from saelab.sae.panneal import PAnnealConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig
from saelab.sae.transcoder import TranscoderConfig

D_IN, D_SAE, K = 9, 40, 5
METADATA = Metadata(
    model_name="tiny",
    model_sha256="ab" * 32,
    hook_name="blocks.1.hook_resid_post",
    context_size=64,
    dataset="demo",
    mean_norm=12.5,
    activation_scale=0.25,
)
CONFIGS: dict[str, Any] = {
    "relu": ReLUConfig(d_sae=D_SAE, l1_coefficient=0.3),
    "relu-seed": ReLUConfig(d_sae=D_SAE, b_dec="zero"),
    "panneal": PAnnealConfig(d_sae=D_SAE, p_end=0.3),
    "gated": GatedConfig(d_sae=D_SAE, l1_coefficient=0.3),
    "topk": TopKConfig(d_sae=D_SAE, k=K, aux_coefficient=0.125, k_aux=3),
    "abstopk": AbsTopKConfig(d_sae=D_SAE, k=K),
    "groupmax": GroupMaxConfig(d_sae=D_SAE, k=K, k_aux=3),
    "jumprelu": JumpReLUConfig(d_sae=D_SAE),
    "batchtopk": BatchTopKConfig(d_sae=D_SAE, k=K),
    "matryoshka": MatryoshkaConfig(d_sae=D_SAE, k=K, group_shares=(0.25, 0.5)),
    "matching_pursuit": MatchingPursuitConfig(d_sae=D_SAE),
    "transcoder": TranscoderConfig(d_sae=D_SAE, activation="relu"),
    "transcoder-narrow": TranscoderConfig(d_sae=D_SAE, activation="relu", d_out=7),
    "transcoder-topk": TranscoderConfig(d_sae=D_SAE, activation="topk", k=K),
    "transcoder-topk-skip": TranscoderConfig(d_sae=D_SAE, activation="topk", k=K, skip=True),
    "transcoder-jumprelu": TranscoderConfig(d_sae=D_SAE, activation="jumprelu"),
    "transcoder-jumprelu-skip": TranscoderConfig(d_sae=D_SAE, activation="jumprelu", skip=True),
    "transcoder-batchtopk": TranscoderConfig(d_sae=D_SAE, activation="batchtopk", k=K),
    "crosscoder": CrosscoderConfig(d_sae=D_SAE, sparsity="l1", n_slots=3),
    "crosscoder-batchtopk": CrosscoderConfig(d_sae=D_SAE, sparsity="batchtopk", k=K),
}
#: Those that a file turns into something else, which computes the same.
TURNED = {"batchtopk": "jumprelu", "matryoshka": "jumprelu", "transcoder-batchtopk": "transcoder"}


def make(name: str, *, unit_decoder: bool = False) -> SAE:
    """The SAE of this name, for inference."""
    config, generator = CONFIGS[name], torch.Generator().manual_seed(2)
    sae = new_sae(config, d_in=D_IN, generator=generator)
    with torch.no_grad():
        for weight, parameter in sae.named_parameters():
            if weight != "b_dec" or getattr(config, "b_dec", "learned") == "learned":
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(0.2 + 0.3 * torch.rand(sae.threshold.shape, generator=generator))
        if unit_decoder:
            sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
    sae.metadata = METADATA
    return sae.requires_grad_(False).eval()


def inputs(sae: SAE, n: int = 20) -> Tensor:
    """Activations as ``encode`` takes them."""
    slots = (sae.n_slots,) if sae.b_dec.dim() == 2 else ()
    return torch.randn(n, *slots, sae.d_in, dtype=sae.dtype)


def assert_same(mine: SAE, theirs: SAE, *, exactly: bool = False) -> None:
    """Both compute the same features and reconstructions, to float32's rounding or bit for bit."""
    acts, tolerance = inputs(mine), 0.0 if exactly else 1e-5
    for function in ("encode", "__call__"):
        a, b = getattr(mine, function)(acts), getattr(theirs, function)(acts)
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    assert mine.encode(acts).any()


def write_saelens(path: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """A file of SAELens, with exactly these settings."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps(dict(settings)))
    return path


def four(seed: int = 3, *, d_out: int = D_IN) -> dict[str, Tensor]:
    """W_enc, b_enc, W_dec, b_dec in SAELens's shapes."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, d_out), "b_dec": (d_out,)}
    return {name: 0.5 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def write_npz(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """params.npz in ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(path / "params.npz", **arrays)
    return path
