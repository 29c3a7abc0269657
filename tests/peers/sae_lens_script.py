"""Runs in the environment of sae_lens, which has no saelab; the protocol is that of peer_jobs.

"write" holds an architecture and the options of its config; with "training" a checkpoint of training is saved, and what
is compared is the SAE that sae_lens exports from it. A job with "loader" reads a file of another tool with the function
of sae_lens for it, which is given a folder on this machine ("root") in the place of the hub.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class, get_sae_training_class
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def written(path: Path, architecture: str, options: dict, training: bool) -> SAE:
    sae_class, config_class = (get_sae_training_class if training else get_sae_class)(architecture)
    torch.manual_seed(0)
    sae = sae_class(config_class(**options))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            # thresholds are positive; all else has both signs
            parameter.add_(0.1 * (torch.rand_like(parameter) if name == "threshold" else torch.randn_like(parameter)))
        if training:
            sae.topk_threshold.fill_(0.31)
    sae.save_model(path)
    if training:
        sae.save_inference_model(path / "exported")
        return SAE.load_from_disk(path / "exported")
    return sae


def converted(path: Path, function: str, root: str, repo_id: str, folder: str, overrides: dict, scale: float) -> SAE:
    def local(repo_id: str, filename: str, subfolder: str = "", **options) -> str:
        return str(Path(root) / repo_id.rpartition("/")[2] / subfolder / filename)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(local(repo_id, filename), framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes

    def read(path, device, cfg_overrides=None):
        return getattr(loaders, function)(repo_id, folder, device, cfg_overrides=overrides)[:2]

    sae = SAE.load_from_disk(path, converter=read)
    if scale != 1:
        sae.fold_activation_norm_scaling_factor(scale)
    return sae


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        path = Path(job["path"])
        if job.get("loader"):
            sae = converted(path, **job["loader"])
        else:
            sae = written(path, **job["write"]) if job["write"] else SAE.load_from_disk(path)
        with torch.no_grad():
            acts = load_file(path / "acts.safetensors")["acts"]
            heads = sae.cfg.reshape_activations == "hook_z"
            given = acts.unflatten(-1, (4, -1)) if heads else acts
            feature_acts = sae.encode(given)
            recon, whole = sae.decode(feature_acts), sae(given)
            if heads:
                recon, whole = recon.flatten(-2), whole.flatten(-2)
            tensors = {"feature_acts": feature_acts, "recon": recon, "whole": whole}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "peer.safetensors")


main()
