"""Runs in the environment of sparsify, which has no saelab; the protocol is that of peer_jobs.

"write" holds the options of a SparseCoderConfig and "d_in".
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig


def write(path: Path, *, d_in: int, **options) -> None:
    torch.manual_seed(0)
    sae = SparseCoder(d_in, SparseCoderConfig(**options))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    sae.save_to_disk(path)


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        path = Path(job["path"])
        if job["write"]:
            write(path, **job["write"])
        sae = SparseCoder.load_from_disk(path)
        acts = load_file(path / "acts.safetensors")["acts"]
        with torch.no_grad():
            top = sae.encode(acts)
            feature_acts = torch.zeros(len(acts), sae.num_latents).scatter(1, top.top_indices, top.top_acts)
            tensors = {
                "feature_acts": feature_acts,
                "recon": sae.decode(top.top_acts, top.top_indices),
                "whole": sae(acts).sae_out,
            }
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "peer.safetensors")


main()
