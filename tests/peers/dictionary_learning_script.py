"""Runs in the environment of dictionary_learning, which has no saelab; the protocol is that of peer_jobs.

"write" holds the name of a dict class ("dict_class") and the sizes ("d_in", "d_sae", "k"); what is saved is what its
trainers save, and what is compared is what ``load_dictionary`` then gives.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from safetensors.torch import load_file, save_file


def new(dict_class: str, d_in: int, d_sae: int, k: int):
    if dict_class == "MatryoshkaBatchTopKSAE":
        sizes = [d_sae // 8, d_sae // 4]
        return MatryoshkaBatchTopKSAE(d_in, d_sae, k, [*sizes, d_sae - sum(sizes)])
    if dict_class in ("AutoEncoderTopK", "BatchTopKSAE"):
        return {"AutoEncoderTopK": AutoEncoderTopK, "BatchTopKSAE": BatchTopKSAE}[dict_class](d_in, d_sae, k)
    return getattr(dictionary, dict_class)(d_in, d_sae)


def write(path: Path, *, dict_class: str, d_in: int, d_sae: int, k: int, threshold: float, told: str | None) -> None:
    torch.manual_seed(0)
    sae = new(dict_class, d_in, d_sae, k)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.add_(
                0.1 * torch.rand_like(parameter) if name == "threshold" else 0.1 * torch.randn_like(parameter)
            )
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(threshold)
    torch.save({name: value.cpu() for name, value in sae.state_dict().items()}, path / "ae.pt")
    trainer = {
        "dict_class": told or dict_class,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "layer": 3,
        "lm_name": "tiny",
    }
    if "k" in sae.state_dict():
        trainer["k"] = k
    settings = {"trainer": trainer | {"submodule_name": "resid_post_layer_3"}, "buffer": {"ctx_len": 128}}
    (path / "config.json").write_text(json.dumps(settings))


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        path = Path(job["path"])
        if job["write"]:
            write(path, **job["write"])
        if job["write"] and job["write"]["told"]:  # load_dictionary cannot read what its own trainer records here
            sae = getattr(dictionary, job["write"]["dict_class"]).from_pretrained(path / "ae.pt")
        else:
            sae, _ = load_dictionary(str(path), device="cpu")
        with torch.no_grad():
            acts = load_file(path / "acts.safetensors")["acts"]
            feature_acts = sae.encode(acts)
            tensors = {"feature_acts": feature_acts, "recon": sae.decode(feature_acts), "whole": sae(acts)}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "peer.safetensors")


main()
