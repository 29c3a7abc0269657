"""dictionary_learning, in its own environment, reads what we write and writes what we read: the same to 1e-5."""

from __future__ import annotations

from pathlib import Path

import peer_jobs
import pytest

from saelab.sae.architectures import CONFIG_OF
from saelab.sae.io import load_sae, save_sae_as

D_IN, D_SAE, K = peer_jobs.D_IN, peer_jobs.D_SAE, 32
pytestmark = peer_jobs.marks

OURS = {
    "relu": ({}, True),
    "relu-free-norms": ({}, False),
    "relu-seed": ({"b_dec": "zero"}, True),
    "gated": ({}, True),
    "jumprelu": ({}, True),
    "topk": ({"k": K}, True),
    "batchtopk": ({"k": K}, True),
    "matryoshka": ({"k": K, "group_shares": (0.125, 0.25)}, True),
}
THEIRS = {
    "AutoEncoder": {},
    "AutoEncoderNew": {},
    "AutoEncoderNew-as-its-trainer-records-it": {"told": "AutoEncoder"},
    "GatedAutoEncoder": {},
    "JumpReluAutoEncoder": {},
    "AutoEncoderTopK": {},
    "BatchTopKSAE": {"threshold": 0.9},
    "BatchTopKSAE-unset": {"threshold": -1.0},
    "MatryoshkaBatchTopKSAE": {"threshold": 0.9},
}


def config(name: str):
    arch = name.partition("-")[0]
    return CONFIG_OF[arch](d_sae=D_SAE, **OURS[name][0])


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for each SAE, after dictionary_learning has been at them."""
    root, jobs = tmp_path_factory.mktemp("dictionary_learning"), []
    for name, (_, unit) in OURS.items():
        sae = peer_jobs.folded(config(name), unit_decoder=unit)
        save_sae_as(sae, root / name, format="dictionary_learning")
        jobs.append(peer_jobs.ours(root, name, sae))
    for name, options in THEIRS.items():
        sizes = {"dict_class": name.partition("-")[0], "d_in": D_IN, "d_sae": D_SAE, "k": K}
        jobs.append(peer_jobs.theirs(root, "their-" + name, sizes | {"threshold": -1.0, "told": None} | options))
    peer_jobs.run("dictionary_learning_script.py", root, jobs)
    return root


@pytest.mark.parametrize("name", OURS)
def test_dictionary_learning_computes_the_same_from_the_files_we_write(name, workshop: Path):
    sae = peer_jobs.folded(config(name), unit_decoder=OURS[name][1])
    peer_jobs.check(f"{name}, read by dictionary_learning", sae, workshop / name)


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_the_same_from_the_files_that_dictionary_learning_writes(name, workshop: Path):
    sae = load_sae(workshop / f"their-{name}")
    assert sae.metadata.hook_name == "blocks.3.hook_resid_post"
    peer_jobs.check(f"{name}, written by dictionary_learning", sae, workshop / f"their-{name}")
