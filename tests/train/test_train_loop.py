from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from saelab import atomic, rundir
from saelab import config as configs
from saelab.activations.loader import ActivationStats
from saelab.errors import ConfigError, Interrupted, TrainingError
from saelab.metrics import METRICS, TIMINGS
from saelab.rundir import StageWriter
from saelab.sae.base import Metadata
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.io import load_sae
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig
from saelab.train.config import TrainConfig
from saelab.train.dead import DeadFeatures
from saelab.train.loop import train_sae
from saelab.train.normaliser import Normaliser
from saelab.train.optim import OptimConfig

D_IN, N_TRUE, ACTIVE = 16, 24, 2
METADATA = Metadata(model_name="none", hook_name="blocks.0.hook_resid_post")
TOPK = TrainConfig(
    sae=TopKConfig(d_sae=48, k=ACTIVE),
    tokens=256 * 300,
    batch_size=256,
    optim=OptimConfig(lr=5e-3),
    stats_tokens=2048,
    checkpoint_every=40,
    log_every=5,
    dead_after_tokens=5000,
)


class SparseMixtures:
    """Activations made of a known dictionary: each token is two of 24 unit directions, plus an offset of the mean."""

    d_in = D_IN
    n_tokens = 10**6

    def __init__(self, batch_size: int = 256, offset: float = 30.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batch_size = batch_size
        self.directions = torch.nn.functional.normalize(torch.randn(N_TRUE, D_IN, generator=generator), dim=1)
        self.offset = offset * torch.randn(D_IN, generator=generator)
        self.poison_at: int | None = None
        self.stop_at: int | None = None

    def at(self, step: int) -> Float[Tensor, "batch d_in"]:
        if step == self.stop_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(1000 + step)
        chosen = torch.rand(self.batch_size, N_TRUE, generator=generator).topk(ACTIVE).indices
        size = 1 + torch.rand(self.batch_size, ACTIVE, generator=generator)
        acts = (size[..., None] * self.directions[chosen]).sum(1) + self.offset
        if step == self.poison_at:
            acts[3, 0] = math.nan
        return acts

    def statistics(self, max_tokens: int) -> ActivationStats:
        acts = torch.cat([self.at(10**6 + i) for i in range(max(1, max_tokens // self.batch_size))])
        centred = acts - acts.mean(0)
        return ActivationStats(
            mean=acts.mean(0),
            mean_norm=float(acts.norm(dim=1).mean()),
            centred_norm=float(centred.pow(2).sum(1).mean().sqrt()),
            median_norm=float(acts.norm(dim=1).median()),
            n_tokens=len(acts),
            gamma=float(acts.mean(0).norm() / centred.std(0).norm()),
        )


def run_in(path: Path, config: TrainConfig) -> StageWriter:
    return StageWriter.create(path, stage="sae", config=configs.to_mapping(config))


def explained(sae, acts: Tensor) -> float:
    with torch.no_grad():
        return float(1 - (acts - sae(acts)).pow(2).sum() / (acts - acts.mean(0)).pow(2).sum())


def test_topk_finds_a_known_dictionary(tmp_path: Path):
    data = SparseMixtures()
    sae = train_sae(TOPK, data, run_in(tmp_path / "sae", TOPK), metadata=METADATA)
    cosines = (data.directions @ sae.W_dec.T).max(1).values
    assert cosines.median() > 0.95
    assert explained(sae, data.at(10**7)) > 0.8


@pytest.mark.parametrize(
    "sae_config", [TopKConfig(d_sae=48, k=3), BatchTopKConfig(d_sae=48, k=3), ReLUConfig(d_sae=48, l1_coefficient=0.02)]
)
def test_every_architecture_learns_and_opens_again(tmp_path: Path, sae_config):
    config = replace(TOPK, sae=sae_config)
    data = SparseMixtures(offset=0.0)
    sae = train_sae(config, data, run_in(tmp_path / "sae", config), metadata=METADATA)
    acts = data.at(10**7)
    assert explained(sae, acts) > 0.6
    torch.testing.assert_close(load_sae(tmp_path)(acts), sae(acts), rtol=1e-5, atol=1e-5)


def test_the_decoder_stays_at_unit_norm_and_the_mean_is_folded_into_b_dec(tmp_path: Path):
    data = SparseMixtures()
    sae = train_sae(TOPK, data, run_in(tmp_path / "sae", TOPK), metadata=METADATA)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48), rtol=1e-5, atol=1e-5)
    assert torch.nn.functional.cosine_similarity(sae.b_dec, data.offset, dim=0) > 0.99
    assert sae.metadata.mean_norm == pytest.approx(data.statistics(2048).mean_norm)


def test_the_seed_architecture_is_neither_centred_nor_given_a_b_dec(tmp_path: Path):
    config = replace(TOPK, sae=ReLUConfig(d_sae=48, l1_coefficient=0.01, b_dec="zero"), tokens=256 * 20)
    sae = train_sae(config, SparseMixtures(), run_in(tmp_path / "sae", config), metadata=METADATA)
    assert not sae.b_dec.any()


def test_normalised_activations_have_mean_zero_and_mean_square_norm_d_in():
    data = SparseMixtures()
    acts = Normaliser.fitted(data.statistics(50_000), centre=True)(data.at(7))
    assert acts.mean(0).norm() < 1.0
    assert float(acts.pow(2).sum(1).mean()) == pytest.approx(D_IN, rel=0.05)


def contents(path: Path) -> dict[str, str]:
    """Hash of every file, without the clock: timings in the metrics, env.json."""
    hashes = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "env.json"):
        if file.name == "metrics.jsonl":
            lines = [{k: v for k, v in line.items() if k not in TIMINGS} for line in rundir.read_metrics(path)]
            hashes[file.name] = json.dumps(lines)
        else:
            hashes[str(file.relative_to(path))] = atomic.sha256(file)
    return hashes


@pytest.mark.parametrize(
    "sae_config", [TopKConfig(d_sae=48, k=3), BatchTopKConfig(d_sae=48, k=3), ReLUConfig(d_sae=48, l1_coefficient=0.02)]
)
@pytest.mark.parametrize("crash_at", [17, 40, 139])
def test_a_run_that_crashed_and_resumed_ends_with_the_same_bytes(tmp_path: Path, crash_at: int, sae_config):
    config = replace(TOPK, sae=sae_config, tokens=256 * 150)
    train_sae(config, SparseMixtures(), run_in(tmp_path / "whole", config), metadata=METADATA)
    crashing = SparseMixtures()
    crashing.stop_at = crash_at
    with pytest.raises(KeyboardInterrupt):
        train_sae(config, crashing, run_in(tmp_path / "crashed", config), metadata=METADATA)
    train_sae(config, SparseMixtures(), StageWriter.resume(tmp_path / "crashed", stage="sae"), metadata=METADATA)
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


def test_ctrl_c_writes_a_checkpoint_and_names_the_resume_command(tmp_path: Path):
    import os
    import signal

    def press(done: int, total: int, detail: str) -> None:
        if done == 33:
            os.kill(os.getpid(), signal.SIGINT)

    config = replace(TOPK, tokens=256 * 100)
    with pytest.raises(Interrupted, match=r"stopped at step 34 of 100; continue with: saelab train --resume"):
        train_sae(config, SparseMixtures(), run_in(tmp_path / "stopped", config), metadata=METADATA, progress=press)
    train_sae(config, SparseMixtures(), StageWriter.resume(tmp_path / "stopped", stage="sae"), metadata=METADATA)
    train_sae(config, SparseMixtures(), run_in(tmp_path / "whole", config), metadata=METADATA)
    stopped, whole = contents(tmp_path / "stopped"), contents(tmp_path / "whole")
    for name in ("sae_weights.safetensors", "cfg.json", "metrics.jsonl"):
        assert stopped[name] == whole[name]


def test_not_a_number_stops_with_the_batch_named_and_the_checkpoint_kept(tmp_path: Path):
    data = SparseMixtures()
    data.poison_at = 57
    with pytest.raises(
        TrainingError,
        match=r"at step 57 \(batch of tokens 14592 to 14847 in the order of seed 0\); 1 of its activations",
    ):
        train_sae(TOPK, data, run_in(tmp_path / "sae", TOPK), metadata=METADATA)
    assert (tmp_path / "sae" / "checkpoints" / "step_000000040").is_dir()
    assert not (tmp_path / "sae" / "DONE").exists()


def test_metrics_carry_known_names_only(tmp_path: Path):
    config = replace(TOPK, tokens=256 * 20)
    train_sae(config, SparseMixtures(), run_in(tmp_path / "sae", config), metadata=METADATA)
    lines = rundir.read_metrics(tmp_path / "sae")
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert {name for line in lines for name in line} <= {*METRICS, "step", "tokens"}


def test_the_seed_decides_everything(tmp_path: Path):
    config = replace(TOPK, tokens=256 * 20)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_sae(replace(config, seed=seed), SparseMixtures(), run_in(tmp_path / name, config), metadata=METADATA)
    weights = [atomic.sha256(tmp_path / name / "sae_weights.safetensors") for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_a_silent_feature_is_dead_after_the_window_and_alive_again_when_it_fires():
    dead = DeadFeatures(3, window_tokens=100)
    for _ in range(11):
        dead.update(torch.tensor([True, False, False]), n_tokens=10)
    assert dead.mask.tolist() == [False, True, True]
    dead.update(torch.tensor([False, True, False]), n_tokens=10)
    assert dead.mask.tolist() == [False, False, True]


def test_tensorboard_gets_the_same_numbers(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(TOPK, tokens=256 * 10, log_to=("tensorboard",))
    train_sae(config, SparseMixtures(), run_in(tmp_path / "sae", config), metadata=METADATA)
    events = EventAccumulator(str(tmp_path / "sae" / "tensorboard")).Reload()
    written = {event.step: event.value for event in events.Scalars("loss")}
    lines = rundir.read_metrics(tmp_path / "sae")
    assert written == {line["step"]: pytest.approx(line["loss"]) for line in lines}


def test_weights_and_biases_gets_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in for the service, which would need an account; its calls are those of wandb 0.31."""
    logged: dict[int, dict] = {}
    service = types.SimpleNamespace(log=lambda record, step: logged.update({step: record}), finish=lambda: None)
    started: dict = {}
    fake = types.SimpleNamespace(init=lambda **arguments: started.update(arguments) or service)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = replace(TOPK, tokens=256 * 10, log_to=("wandb",))
    train_sae(config, SparseMixtures(), run_in(tmp_path / "sae", config), metadata=METADATA)
    assert started["config"]["sae"]["k"] == ACTIVE
    assert list(logged.values()) == rundir.read_metrics(tmp_path / "sae")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"tokens": 10}, "tokens is 10, less than one batch of 256"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"log_every": 0}, "log_every must be at least 1"),
        ({"keep_every": 0}, "keep_every must be at least 1"),
        ({"dead_after_tokens": 0}, "dead_after_tokens must be at least 1"),
        ({"outlier_factor": 0.0}, "outlier_factor is a multiple of the median norm above 1"),
    ],
)
def test_impossible_settings_are_refused(change: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        replace(TOPK, **change)
    with pytest.raises(ConfigError, match=r"optim.lr must be between 0 and 1, got 5"):
        OptimConfig(lr=5.0)
    with pytest.raises(ConfigError, match=r"optim.betas must be at least 0 and below 1"):
        OptimConfig(betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match=r"optim.clip_norm must be above 0"):
        OptimConfig(clip_norm=0.0)


def test_the_learning_rate_follows_its_rule():
    config = OptimConfig(warmup_share=0.1, decay_share=0.5)
    assert config.peak_lr(16384) == pytest.approx(2e-4)
    assert config.peak_lr(4 * 16384) == pytest.approx(1e-4)
    rates = [config.lr_at(step, n_steps=100, d_sae=16384) for step in range(100)]
    assert max(rates) == pytest.approx(2e-4)
    assert rates[0] == pytest.approx(2e-5)
    assert rates[-1] == pytest.approx(2e-4 / 50)
