"""The step without gradient tensors: the same training as the step with them, and the same bits in every run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import saelab.train.trainer as trainer
from saelab import config as configs
from saelab.activations.loader import ActivationStats
from saelab.rundir import StageWriter, read_metrics
from saelab.sae.base import SAE, Metadata
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig
from saelab.train.config import TrainConfig
from saelab.train.loop import train_sae
from saelab.train.optim import OptimConfig
from saelab_kernels.revive import packed

D_IN, BATCH = 16, 64
METADATA = Metadata(model_name="none", hook_name="blocks.0.hook_resid_post")


class Mixtures:
    """Each token is three of 40 unit directions; a batch is a function of the step."""

    d_in = D_IN

    def at(self, step: int) -> Float[Tensor, "batch d_in"]:
        generator = torch.Generator().manual_seed(step)
        directions = torch.nn.functional.normalize(torch.randn(40, D_IN, generator=torch.Generator().manual_seed(0)))
        acts = torch.rand(BATCH, 40, generator=generator)
        return (acts * (acts >= acts.topk(3).values[:, -1:])) @ directions

    def statistics(self, max_tokens: int) -> ActivationStats:
        acts = torch.cat([self.at(10**6 + step) for step in range(16)])
        mean, norms = acts.mean(0), acts.norm(dim=1)
        size = float((acts - mean).pow(2).sum(1).mean().sqrt())
        return ActivationStats(
            mean=mean,
            mean_norm=float(norms.mean()),
            median_norm=float(norms.median()),
            centred_norm=size,
            gamma=float(mean.norm()) / size,
            n_tokens=len(acts),
        )


def trained(path: Path, sae, *, steps: int = 60, clip_norm: float | None = 1.0) -> SAE:
    config = TrainConfig(
        sae=sae,
        tokens=steps * BATCH,
        batch_size=BATCH,
        optim=OptimConfig(lr=3e-3, clip_norm=clip_norm),
        stats_tokens=1024,
        log_every=1,
        dead_after_tokens=10 * BATCH,  # so that AuxK takes part
    )
    run = StageWriter.create(path, stage="sae", config=configs.to_mapping(config))
    return train_sae(config, Mixtures(), run, metadata=METADATA)


ARCHITECTURES = [TopKConfig(d_sae=80, k=3), BatchTopKConfig(d_sae=80, k=3)]


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize("sae", ARCHITECTURES, ids=lambda config: config.arch)
def test_it_trains_as_autograd_and_torch_optim_do(sae, clip_norm, tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "reference")  # autograd through dense torch
    with_tensors = trained(tmp_path / "dense", sae, clip_norm=clip_norm)
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    monkeypatch.setattr(packed.dispatch, "bfloat16_units", lambda _: False)  # AuxK in float32, as autograd has it
    without = trained(tmp_path / "sparse", sae, clip_norm=clip_norm)
    for ours, theirs in zip(without.layer, with_tensors.layer, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
    dense, sparse = (read_metrics(tmp_path / name) for name in ("dense", "sparse"))
    assert any(line["aux"] > 0 for line in dense)
    for name in ("loss", "reconstruction", "aux", "l0", "n_dead", "grad_norm", "lr"):
        ours, theirs = ([line[name] for line in lines] for lines in (sparse, dense))
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("sae", ARCHITECTURES, ids=lambda config: config.arch)
def test_two_runs_of_200_steps_give_the_same_bits(sae, tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    first, second = (trained(tmp_path / name, sae, steps=200) for name in ("first", "second"))
    for ours, theirs in zip(first.layer, second.layer, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("sae", "path", "fused"),
    [
        (ARCHITECTURES[0], "cpu", True),
        (ARCHITECTURES[1], "cpu", True),
        (ARCHITECTURES[0], "reference", False),
        (ReLUConfig(d_sae=80), "cpu", False),
        (TopKConfig(d_sae=16, k=8), "auto", False),  # dense is faster
    ],
)
def test_it_is_taken_where_gradients_are_sparse(sae, path, fused, tmp_path, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    steps = []
    original = trainer.fused_step_
    monkeypatch.setattr(trainer, "fused_step_", lambda *args, **kwargs: steps.append(1) or original(*args, **kwargs))
    trained(tmp_path / "run", sae, steps=3)
    assert len(steps) == (3 if fused else 0)
