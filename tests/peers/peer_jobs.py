"""What the tests against every peer share: jobs for its environment, and the comparison of what it computed.

A job is {"path", "write"}. Where "write" is null the peer loads the SAE in the directory ``path``; else it makes one of
the kind that "write" describes and saves it there. It then reads "acts" of acts.safetensors and writes peer.safetensors
with "feature_acts", "recon" (decoded from these) and "whole" (the forward pass). SAELAB_PEER_PYTHON names the
interpreter that has the peers; ``make test-peer`` makes one in .venv-peer.
"""

from __future__ import annotations

import json
import os
import subprocess
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelab.sae.base import SAE, Metadata
from saelab.sae.io import new_sae

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SAELAB_PEER_PYTHON") or ROOT / ".venv-peer" / "bin" / "python")
TOLERANCE = 1e-5
D_IN, D_SAE = 64, 1024
N_ACTS = 512

marks = [
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}; run make test-peer or set SAELAB_PEER_PYTHON"),
]


def run(script: str, root: Path, jobs: list[dict[str, Any]]) -> None:
    """Let the peer do all jobs in one process, since its import takes long."""
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [PYTHON, Path(__file__).with_name(script), root / "jobs.json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def draws(name: str, d_in: int) -> torch.Tensor:
    """The same activations in every run: of unseeded ones, now and then one lay within rounding of a threshold."""
    return torch.randn(N_ACTS, d_in, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def theirs(root: Path, name: str, write: Mapping[str, Any], *, d_in: int = D_IN) -> dict[str, Any]:
    """A job in which the peer makes and saves an SAE."""
    path = root / name
    path.mkdir()
    save_file({"acts": draws(name, d_in)}, path / "acts.safetensors")
    return {"path": str(path), "write": dict(write)}


def ours(root: Path, name: str, sae: SAE) -> dict[str, Any]:
    """A job in which the peer loads what we have written to ``root / name``."""
    acts = draws(name, sae.d_in) / 0.37
    if sae.d_in == sae.d_out and sae.cfg.arch != "transcoder":
        acts += sae.b_dec.detach()
    save_file({"acts": acts}, root / name / "acts.safetensors")
    return {"path": str(root / name), "write": None}


def relative_rms(mine: torch.Tensor, peer: torch.Tensor) -> float:
    return float((mine - peer).norm() / peer.norm())


def check(name: str, sae: SAE, path: Path, *, decodes: bool = True, passes: bool = True) -> None:
    """Compare features and reconstructions; ``decodes`` or ``passes`` is False where the peer's decode leaves something
    out or its forward pass computes something else than encode and decode."""
    acts, peer = load_file(path / "acts.safetensors")["acts"], load_file(path / "peer.safetensors")
    with torch.no_grad():
        feature_acts = sae.encode(acts)
        errors = {"feature_acts": relative_rms(feature_acts, peer["feature_acts"])}
        if passes:
            errors["recon in one step"] = relative_rms(sae(acts), peer["whole"])
        if decodes:
            errors["recon"] = relative_rms(sae.decode(peer["feature_acts"]), peer["recon"])
    for quantity, error in errors.items():
        print(f"{name}: relative RMS of {quantity} {error:.1e}")  # pytest -s shows the numbers
    assert peer["feature_acts"].any()
    assert torch.equal(feature_acts != 0, peer["feature_acts"] != 0)
    assert max(errors.values()) <= TOLERANCE, errors


def folded(config: Any, *, unit_decoder: bool = True, d_in: int = D_IN) -> SAE:
    """An SAE as training leaves it: every weight its own, and folded to raw activations with a mean and a scale."""
    generator = torch.Generator().manual_seed(0)
    sae = new_sae(config, d_in=d_in, generator=generator)
    is_zero = getattr(config, "b_dec", "learned") == "zero"
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if not (name == "b_dec" and is_zero):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if unit_decoder:
            sae.normalise_decoder_()
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(0.2 + 0.6 * torch.rand(sae.threshold.shape, generator=generator))
    slots = sae.n_slots
    mean = 5 * torch.randn(*([slots] if slots else []), d_in, generator=generator) * (not is_zero)
    sae.fold_(mean, 0.37 if slots is None else torch.full((slots,), 0.37))
    sae.metadata = Metadata(model_name="tiny", hook_name="blocks.1.hook_resid_post", context_size=128, mean_norm=30.0)
    return sae.requires_grad_(False).eval()


def name_of(config: Any) -> str:
    parts = [config.arch]
    if config.arch == "transcoder":
        parts += [config.activation, "skip" if config.skip else "plain"]
    return "-".join(parts) + "-seed" * (getattr(config, "b_dec", "") == "zero")
