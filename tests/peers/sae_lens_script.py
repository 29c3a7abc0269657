"""Runs in the environment of sae_lens, which has no saelab: reads and writes SAEs and records what it computes.

The one argument is a JSON file with a list of jobs {"path", "write"}. Where "write" is null the SAE in the directory
``path`` is loaded; else it holds an architecture and the options of its config, and a random SAE is saved there. Each
job then encodes and decodes the tensor "acts" of acts.safetensors and writes peer.safetensors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from safetensors.torch import load_file, save_file

CLASSES = {
    "standard": (StandardSAE, StandardSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
}


def written(path: Path, architecture: str, options: dict) -> SAE:
    sae_class, config_class = CLASSES[architecture]
    sae = sae_class(config_class(**options))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    sae.save_model(path)
    return sae


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        path = Path(job["path"])
        sae = written(path, **job["write"]) if job["write"] else SAE.load_from_disk(path)
        with torch.no_grad():
            feature_acts = sae.encode(load_file(path / "acts.safetensors")["acts"])
            save_file({"feature_acts": feature_acts, "recon": sae.decode(feature_acts)}, path / "peer.safetensors")


main()
