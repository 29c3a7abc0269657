"""sae_lens, in its own environment, reads what we write and writes what we read: the same vectors to 1e-5."""

from __future__ import annotations

from pathlib import Path

import peer_jobs
import pytest
import torch

from saelab.sae.architectures import CONFIG_OF
from saelab.sae.io import load_sae_files, save_sae

D_IN, D_SAE, K = peer_jobs.D_IN, peer_jobs.D_SAE, 32
pytestmark = peer_jobs.marks

OURS = {
    "relu": {},
    "relu-seed": {"b_dec": "zero"},
    "panneal": {},
    "topk": {"k": K},
    "abstopk": {"k": K},
    "batchtopk": {"k": K},
    "matryoshka": {"k": K},
    "jumprelu": {},
    "gated": {},
    "matching_pursuit": {},
    "transcoder-relu": {"activation": "relu"},
    "transcoder-relu-skip": {"activation": "relu", "skip": True},
    "transcoder-batchtopk": {"activation": "batchtopk", "k": K},
    "transcoder-jumprelu-skip": {"activation": "jumprelu", "skip": True},
}
THEIRS = {
    "standard": {},
    "standard-uncentred": {"apply_b_dec_to_input": False},
    "standard-heads": {"reshape_activations": "hook_z"},
    "topk-plain": {"k": K, "rescale_acts_by_decoder_norm": False},
    "topk-rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "topk-uncentred-rescaled": {"k": K, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False},
    "abstopk-plain": {"k": K, "rescale_acts_by_decoder_norm": False},
    "abstopk-rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "jumprelu-uncentred": {"apply_b_dec_to_input": False},
    "gated": {},
    "gated-uncentred": {"apply_b_dec_to_input": False},
    "matching_pursuit": {"max_iterations": 8},
    "matching_pursuit-uncentred": {"max_iterations": 8, "apply_b_dec_to_input": False},
    "transcoder": {"d_out": 48},
    "skip_transcoder": {"d_out": 48},
    "jumprelu_transcoder": {"d_out": 48},
    "jumprelu_skip_transcoder": {"d_out": 48},
    "batchtopk-training": {"k": 32.0},
    "batchtopk-training-plain": {"k": 32.0, "rescale_acts_by_decoder_norm": False},
    "matryoshka_batchtopk-training": {"k": 32.0, "matryoshka_widths": [128, 256]},
}


def config(name: str):
    return CONFIG_OF[name.partition("-")[0]](d_sae=D_SAE, **OURS[name])


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for each SAE, after sae_lens has been at them."""
    root, jobs = tmp_path_factory.mktemp("sae_lens"), []
    for name in OURS:
        sae = peer_jobs.folded(config(name))
        save_sae(sae, root / name, density=torch.rand(D_SAE))
        jobs.append(peer_jobs.ours(root, name, sae))
    for name, options in THEIRS.items():
        architecture, settings = name.partition("-")[0], {"d_in": D_IN, "d_sae": D_SAE} | options
        if "transcoder" in architecture:
            settings["apply_b_dec_to_input"] = False
        write = {"architecture": architecture, "options": settings, "training": "training" in name}
        jobs.append(peer_jobs.theirs(root, "their-" + name, write))
    peer_jobs.run("sae_lens_script.py", root, jobs)
    return root


@pytest.mark.parametrize("name", OURS)
def test_sae_lens_computes_the_same_from_the_files_we_write(name, workshop: Path):
    decodes = "skip" not in name
    peer_jobs.check(f"{name}, read by sae_lens", peer_jobs.folded(config(name)), workshop / name, decodes=decodes)


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_the_same_from_the_files_that_sae_lens_writes(name, workshop: Path):
    path = workshop / f"their-{name}"
    peer_jobs.check(f"{name}, written by sae_lens", load_sae_files(path), path, decodes="skip" not in name)
