"""Files of the public suites, built in their documented layout: we read them as sae_lens's own loaders do, to 1e-5."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import peer_jobs
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from saelab.sae.io import load_sae

D_IN, D_SAE = 32, 256
pytestmark = peer_jobs.marks
GEMMA = "google/gemma-scope-2b-pt-res"
GEMMA_2 = "google/gemma-scope-2-1b-pt"
LLAMA = "fnlp/Llama3_1-8B-Base-LXR-8x"


def weights(**more: Tensor) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    return {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()} | more


def gemma_scope(folder: Path, _: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {name: t.numpy() for name, t in weights(threshold=torch.rand(D_SAE)).items()}
    np.savez(folder / "params.npz", **arrays)


def gemma_scope_2(folder: Path, settings: dict[str, Any]) -> None:
    tensors = {name.lower(): tensor for name, tensor in weights(threshold=torch.rand(D_SAE)).items()}
    if settings.get("affine_connection"):
        tensors["affine_skip_connection"] = torch.randn(D_IN, D_IN)
    save_file(tensors, folder / "params.safetensors")
    told = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-1b-pt",
        "hf_hook_point_in": "model.layers.9.output",
    }
    (folder / "config.json").write_text(json.dumps(told | settings))


def llama_scope(folder: Path, settings: dict[str, Any]) -> None:
    plain = weights()
    tensors = {"encoder.weight": plain["W_enc"].T, "decoder.weight": plain["W_dec"].T}
    tensors |= {"encoder.bias": plain["b_enc"], "decoder.bias": plain["b_dec"]}
    (folder / "checkpoints").mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "checkpoints" / "final.safetensors")
    hook = "blocks.8.hook_resid_post"
    told = {"d_model": D_IN, "d_sae": D_SAE, "hook_point_in": hook, "hook_point_out": hook, "jump_relu_threshold": 0.2}
    (folder / "hyperparams.json").write_text(json.dumps(told | settings))


def legacy(folder: Path, settings: dict[str, Any]) -> None:
    tensors = weights()
    architecture = settings.get("architecture")
    if architecture == "jumprelu":
        tensors["threshold"] = torch.rand(D_SAE)
    if architecture == "gated":
        tensors |= {"b_gate": tensors.pop("b_enc"), "b_mag": torch.randn(D_SAE), "r_mag": torch.randn(D_SAE)}
    save_file(tensors | {"scaling_factor": torch.ones(D_SAE)}, folder / "sae_weights.safetensors")
    told = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "model_name": "gpt2"}
    (folder / "cfg.json").write_text(json.dumps(told | settings))


TRANSCODER = {"hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output"}
#: How to build the file, its settings, repository, folder, sae_lens's loader, and the scale it leaves to its caller.
FILES: dict[str, tuple[Any, dict[str, Any], str, str, str, float]] = {
    "gemma_scope": (gemma_scope, {}, GEMMA, "layer_20/width_16k/average_l0_71", "gemma_2_sae", 1.0),
    "gemma_scope-embedding": (gemma_scope, {}, GEMMA, "embedding/width_4k/average_l0_6", "gemma_2_sae", 1.0),
    "gemma_scope_2": (gemma_scope_2, {}, GEMMA_2, "resid_post/layer_9_width_16k_l0_small", "gemma_3_sae", 1.0),
    "gemma_scope_2-transcoder": (
        gemma_scope_2,
        TRANSCODER | {"affine_connection": False},
        GEMMA_2,
        "transcoder/layer_9_width_16k_l0_small",
        "gemma_3_sae",
        1.0,
    ),
    "gemma_scope_2-skip": (
        gemma_scope_2,
        TRANSCODER | {"affine_connection": True},
        GEMMA_2,
        "transcoder/layer_9_width_16k_l0_small_affine",
        "gemma_3_sae",
        1.0,
    ),
    "llama_scope": (
        llama_scope,
        {"dataset_average_activation_norm": {"in": 3.0, "out": 3.0}},
        LLAMA,
        "Llama3_1-8B-Base-L8R-8x",
        "llama_scope_sae",
        math.sqrt(D_IN) / 3,
    ),
}
LEGACY = {
    "standard": {"hook_point": "blocks.3.hook_resid_pre", "activation_fn_str": "relu"},
    "hook_z": {"hook_name": "blocks.3.attn.hook_z", "architecture": "standard", "sae_lens_version": "5.1.0"},
    "topk": {"activation_fn": "topk", "activation_fn_kwargs": {"k": 16}, "normalize_activations": False},
    "jumprelu": {"architecture": "jumprelu", "apply_b_dec_to_input": False},
    "gated": {"architecture": "gated", "normalize_activations": "none"},
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations and what sae_lens computes in one directory for each file, the file below it."""
    root, jobs = tmp_path_factory.mktemp("loaders"), []
    for name, (build, settings, repository, folder, loader, scale) in FILES.items():
        job = peer_jobs.theirs(root, name, {}, d_in=D_IN)
        place = root / name / repository.rpartition("/")[2] / folder
        place.mkdir(parents=True)
        build(place, settings)
        overrides = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32"}
        told = {"function": f"{loader}_huggingface_loader", "root": str(root / name), "repo_id": repository}
        jobs.append(job | {"loader": told | {"folder": folder, "overrides": overrides, "scale": scale}})
    for name, settings in LEGACY.items():
        jobs.append(peer_jobs.theirs(root, f"legacy-{name}", {}, d_in=D_IN))
        legacy(root / f"legacy-{name}", settings)
    peer_jobs.run("sae_lens_script.py", root, jobs)
    return root


@pytest.mark.parametrize("name", FILES)
def test_public_suites_are_read_as_sae_lens_reads_them(name, workshop: Path):
    _, _, repository, folder, _, _ = FILES[name]
    sae = load_sae(workshop / name / repository.rpartition("/")[2] / folder)
    peer_jobs.check(f"{name}, loaded by sae_lens", sae, workshop / name, decodes="skip" not in name)


@pytest.mark.parametrize("name", LEGACY)
def test_files_of_sae_lens_before_6_are_read_as_it_reads_them(name, workshop: Path):
    path = workshop / f"legacy-{name}"
    peer_jobs.check(f"{name} of version 5, loaded by sae_lens", load_sae(path), path)
