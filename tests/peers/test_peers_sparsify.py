"""sparsify, in its own environment, reads what we write and writes what we read: the same to 1e-5."""

from __future__ import annotations

from pathlib import Path

import peer_jobs
import pytest

from saelab.sae.architectures import CONFIG_OF
from saelab.sae.io import load_sae, save_sae_as

D_IN, D_SAE, K = peer_jobs.D_IN, peer_jobs.D_SAE, 32
pytestmark = peer_jobs.marks

OURS = {
    "topk": {"k": K},
    "groupmax": {"k": K},
    "transcoder": {"k": K, "activation": "topk", "skip": False},
    "transcoder-skip": {"k": K, "activation": "topk", "skip": True},
}
THEIRS = {
    "topk": {},
    "topk-by-expansion": {"num_latents": 0, "expansion_factor": 4},
    "topk-free-norms": {"normalize_decoder": False},
    "multi-topk": {"multi_topk": True},
    "groupmax": {"activation": "groupmax"},
    "transcoder": {"transcode": True},
    "skip-transcoder": {"transcode": True, "skip_connection": True},
    "skip-autoencoder": {"skip_connection": True},
}


def config(name: str):
    return CONFIG_OF[name.partition("-")[0]](d_sae=D_SAE, **OURS[name])


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for each SAE, after sparsify has been at them."""
    root, jobs = tmp_path_factory.mktemp("sparsify"), []
    for name in OURS:
        sae = peer_jobs.folded(config(name))
        save_sae_as(sae, root / name, format="sparsify")
        jobs.append(peer_jobs.ours(root, name, sae))
    for name, options in THEIRS.items():
        settings = {"d_in": D_IN, "num_latents": D_SAE, "k": K} | options
        jobs.append(peer_jobs.theirs(root, "their-" + name, settings))
    peer_jobs.run("sparsify_script.py", root, jobs)
    return root


@pytest.mark.parametrize("name", OURS)
def test_sparsify_computes_the_same_from_the_files_we_write(name, workshop: Path):
    decodes = "skip" not in name
    peer_jobs.check(f"{name}, read by sparsify", peer_jobs.folded(config(name)), workshop / name, decodes=decodes)


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_the_same_from_the_files_that_sparsify_writes(name, workshop: Path):
    sae, path = load_sae(workshop / f"their-{name}"), workshop / f"their-{name}"
    passes = name != "multi-topk"  # the forward pass of sparsify then returns what 4 k features reconstruct
    peer_jobs.check(f"{name}, written by sparsify", sae, path, decodes="skip" not in name, passes=passes)
