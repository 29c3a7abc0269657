"""sae_lens, in its own environment, reads what we write and writes what we read: the same vectors to 1e-5.

SAELAB_PEER_PYTHON names the interpreter that has sae_lens; `make test-peer` makes one in .venv-peer.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelab.sae.base import SAE, Metadata
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.io import load_sae_files, new_sae, save_sae
from saelab.sae.jumprelu import JumpReLUConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SAELAB_PEER_PYTHON") or ROOT / ".venv-peer" / "bin" / "python")
SCRIPT = Path(__file__).with_name("sae_lens_script.py")
TOLERANCE = 1e-5
D_IN, D_SAE = 64, 1024
OURS = [
    ReLUConfig(d_sae=D_SAE),
    ReLUConfig(d_sae=D_SAE, b_dec="zero"),
    TopKConfig(d_sae=D_SAE, k=32),
    BatchTopKConfig(d_sae=D_SAE, k=32),
    JumpReLUConfig(d_sae=D_SAE),
]
THEIRS = {
    "standard": ("standard", {}),
    "standard-uncentred": ("standard", {"apply_b_dec_to_input": False}),
    "topk-plain": ("topk", {"k": 32, "rescale_acts_by_decoder_norm": False}),
    "topk-rescaled": ("topk", {"k": 32, "rescale_acts_by_decoder_norm": True}),
    "jumprelu-theirs": ("jumprelu", {}),
    "jumprelu-uncentred": ("jumprelu", {"apply_b_dec_to_input": False}),
}

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}; run make test-peer or set SAELAB_PEER_PYTHON"),
]


def relative_rms(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def check(name: str, sae: SAE, path: Path) -> None:
    acts, theirs = load_file(path / "acts.safetensors")["acts"], load_file(path / "peer.safetensors")
    with torch.no_grad():
        feature_acts = sae.encode(acts)
        errors = {
            "feature_acts": relative_rms(feature_acts, theirs["feature_acts"]),
            "recon": relative_rms(sae.decode(feature_acts), theirs["recon"]),
            "recon in one step": relative_rms(sae(acts), theirs["recon"]),
        }
    for quantity, error in errors.items():
        print(f"{name}: relative RMS of {quantity} {error:.1e}")  # pytest -s shows the numbers
    assert theirs["feature_acts"].any()
    assert torch.equal(feature_acts > 0, theirs["feature_acts"] > 0)
    assert max(errors.values()) <= TOLERANCE, errors


def folded(config) -> SAE:
    """An SAE as training leaves it: every weight its own, and folded to raw activations with a mean and a scale."""
    generator = torch.Generator().manual_seed(0)
    sae = new_sae(config, d_in=D_IN, generator=generator)
    seeded = getattr(config, "b_dec", "learned") == "zero"
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if not (name == "b_dec" and seeded):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        sae.normalise_decoder_()
    if isinstance(config, BatchTopKConfig):
        sae.training_loss(torch.randn(256, D_IN, generator=generator))
    elif isinstance(config, JumpReLUConfig):
        sae.threshold.data.uniform_(0.2, 0.8, generator=generator)
    sae.fold_(torch.zeros(D_IN) if seeded else 5 * torch.randn(D_IN, generator=generator), 0.37)
    sae.metadata = Metadata(model_name="tiny", hook_name="blocks.1.hook_resid_post", context_size=128, mean_norm=30.0)
    return sae


def name_of(config) -> str:
    return config.arch + "-seed" * (getattr(config, "b_dec", "") == "zero")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for each SAE, after sae_lens has been at them, in one process, since its import takes long."""
    root, jobs = tmp_path_factory.mktemp("peers"), []
    for config in OURS:
        sae, path = folded(config), root / name_of(config)
        save_sae(sae, path, density=torch.rand(D_SAE))
        save_file({"acts": sae.b_dec.detach() + torch.randn(512, D_IN) / 0.37}, path / "acts.safetensors")
        jobs.append({"path": str(path), "write": None})
    for name, (architecture, options) in THEIRS.items():
        path = root / name
        path.mkdir()
        save_file({"acts": torch.randn(512, D_IN)}, path / "acts.safetensors")
        settings = options | {"d_in": D_IN, "d_sae": D_SAE}
        jobs.append({"path": str(path), "write": {"architecture": architecture, "options": settings}})
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [PYTHON, SCRIPT, root / "jobs.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.parametrize("config", OURS, ids=name_of)
def test_sae_lens_computes_the_same_from_the_files_we_write(config, workshop: Path):
    check(f"{name_of(config)}, read by sae_lens", folded(config), workshop / name_of(config))


@pytest.mark.parametrize("name", THEIRS)
def test_we_compute_the_same_from_the_files_that_sae_lens_writes(name, workshop: Path):
    check(f"{name}, written by sae_lens", load_sae_files(workshop / name), workshop / name)
