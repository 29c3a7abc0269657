"""The running mean of the weights, the L0 controller, the proxy for the right L0, what an offset predicts."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_stream import Mixtures, contents, run_in

from saelab import config as configs
from saelab import rundir
from saelab.errors import ConfigError, ShapeError
from saelab.rundir import StageWriter
from saelab.sae.base import Metadata
from saelab.sae.io import load_sae
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig
from saelab.train.config import TrainConfig
from saelab.train.ema import WeightAverage
from saelab.train.l0 import L0Controller, coefficient_of, decoder_projection
from saelab.train.loop import train_sae
from saelab.train.optim import OptimConfig
from saelab.train.trainer import Trainer

METADATA = Metadata(model_name="none", hook_name="blocks.0.hook_resid_post")
TOPK = TrainConfig(
    sae=TopKConfig(d_sae=40, k=3),
    tokens=64 * 60,
    batch_size=64,
    optim=OptimConfig(lr=3e-3),
    stats_tokens=512,
    checkpoint_every=25,
    log_every=1,
)
RELU = replace(TOPK, sae=ReLUConfig(d_sae=40, l1_coefficient=0.1), tokens=64 * 600)


def test_the_average_is_the_weighted_sum_of_all_weights_so_far():
    sae = Trainer(TOPK, Mixtures(), "cpu").sae
    average = WeightAverage(sae, decay=0.5)
    expected = [parameter.detach().clone() for parameter in sae.parameters()]
    for n in range(6):
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(sae)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = [
            decay * old + (1 - decay) * new.detach() for old, new in zip(expected, sae.parameters(), strict=True)
        ]
    for mean, value in zip(average.means.values(), expected, strict=True):
        torch.testing.assert_close(mean, value)
    average.put_into_(sae)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(sae.encoder.detach(), expected[0])


def test_the_average_is_published_and_the_weights_of_training_stay_as_they_were(tmp_path: Path):
    data, config = Mixtures(), replace(TOPK, ema_decay=0.99)
    trainer = Trainer(config, data, "cpu")
    for step in range(config.n_steps):
        trainer.advance(data.at(step))
    mean = {name: value.clone() for name, value in trainer.average.means.items()}
    plain = train_sae(TOPK, data, run_in(tmp_path / "plain", TOPK), metadata=METADATA)
    averaged = train_sae(config, data, run_in(tmp_path / "averaged", config), metadata=METADATA)
    assert not torch.equal(plain.W_dec, averaged.W_dec)
    torch.testing.assert_close(averaged.encoder.detach(), mean["encoder"])
    torch.testing.assert_close(averaged.W_dec.norm(dim=1), torch.ones(40))
    assert rundir.read_metrics(tmp_path / "plain")[-1]["loss"] == rundir.read_metrics(tmp_path / "averaged")[-1]["loss"]


@pytest.mark.parametrize(
    "config",
    [replace(TOPK, ema_decay=0.99), replace(RELU, target_l0=3.0, tokens=64 * 60, ema_decay=0.9)],
    ids=["average", "controller"],
)
def test_a_crash_does_not_change_the_average_or_the_controller(tmp_path: Path, config: TrainConfig):
    train_sae(config, Mixtures(), run_in(tmp_path / "whole", config), metadata=METADATA)

    class Crashing(Mixtures):
        def at(self, step: int):
            if step == 41:
                raise KeyboardInterrupt
            return super().at(step)

    with pytest.raises(KeyboardInterrupt):
        train_sae(config, Crashing(), run_in(tmp_path / "crashed", config), metadata=METADATA)
    train_sae(config, Mixtures(), StageWriter.resume(tmp_path / "crashed", stage="sae"), metadata=METADATA)
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("l1_coefficient", [0.02, 0.1, 2.0])
def test_the_controller_reaches_its_l0_from_either_side(tmp_path: Path, l1_coefficient: float):
    sae = ReLUConfig(d_sae=40, l1_coefficient=l1_coefficient)
    config = replace(RELU, sae=sae, target_l0=3.0, tokens=64 * 1000, log_every=5)
    result = train_sae(config, Mixtures(), run_in(tmp_path / "sae", config), metadata=METADATA)
    lines = rundir.read_metrics(tmp_path / "sae")
    end = [line["l0"] for line in lines[-20:]]
    assert sum(end) / len(end) == pytest.approx(3.0, rel=0.1)
    assert not any(line["saturated"] for line in lines)
    assert lines[0]["coefficient"] == pytest.approx(l1_coefficient)  # it waits for the first twentieth
    assert result.cfg == sae


def test_a_coefficient_at_its_limit_is_warned_of_once_and_marked(caplog: pytest.LogCaptureFixture):
    controller = L0Controller(ReLUConfig(d_sae=40), target=3.0, n_steps=1000)
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            controller.update(30.0, progress=0.5)
    assert controller.saturated
    assert controller.coefficient == pytest.approx(1000.0)
    assert len([record for record in caplog.records if "saturated" in record.message]) == 1
    controller.update(0.0, progress=0.5)
    assert not controller.saturated


def test_the_controller_is_proportional_and_integral_in_logarithms():
    controller = L0Controller(ReLUConfig(d_sae=40, l1_coefficient=2.0), target=10.0, n_steps=4000)  # T = 200
    error = math.log(12 / 10)
    controller.update(12.0, progress=0.01)
    assert controller.coefficient == 2.0
    for n in range(1, 4):
        controller.update(12.0, progress=0.5)
        assert math.log(controller.coefficient / 2) == pytest.approx(error * (1 + n / 200))
    controller.update(10.0, progress=0.5)  # on target the proportional part is gone, what was added up stays
    assert math.log(controller.coefficient / 2) == pytest.approx(error * 3 / 200)


def test_architectures_without_a_coefficient_and_long_warm_ups_are_refused():
    with pytest.raises(ConfigError, match=r"set sae\.k"):
        coefficient_of(TopKConfig(d_sae=40, k=3))
    with pytest.raises(ConfigError, match="warmed up early, not over 1 of the training"):
        coefficient_of(ReLUConfig(d_sae=40, l1_warmup_share=1.0))
    assert coefficient_of(ReLUConfig(d_sae=40)) == "l1_coefficient"


def test_the_projection_is_the_nth_largest_in_units_of_the_norm():
    acts = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 5.0]])  # projections on the axes: 3, 4, 0 and 0, 0, 5
    assert decoder_projection(acts, torch.eye(3), torch.zeros(3), n=1) == pytest.approx(3 / 5)
    assert decoder_projection(7 * acts, 2 * torch.eye(3), torch.zeros(3), n=1) == pytest.approx(3 / 5)
    assert decoder_projection(acts + 1, torch.eye(3), torch.ones(3), n=1) == pytest.approx(3 / 5)
    assert decoder_projection(acts, torch.eye(3), torch.zeros(3), n=2) == pytest.approx(0.0)
    for n in (0, 3):
        with pytest.raises(ShapeError, match="between 1 and d_sae - 1"):
            decoder_projection(acts, torch.eye(3), torch.zeros(3), n=n)


def test_rows_that_mix_correlated_features_project_further_than_the_true_ones():
    """What an L0 that is too low does to a dictionary, as arXiv 2508.16560 has it."""
    generator = torch.Generator().manual_seed(0)
    true = torch.linalg.qr(torch.randn(32, 20, generator=generator)).Q.T.contiguous()
    acts = (torch.rand(2000, 20, generator=generator) < 0.2).float() @ true
    mixed = torch.nn.functional.normalize(true + 0.3 * true.roll(1, 0))
    score = [decoder_projection(acts, W_dec, torch.zeros(32), n=6) for W_dec in (true, mixed)]
    assert score[0] == pytest.approx(0.0, abs=1e-5)
    assert score[1] > 0.02


def test_an_offset_that_is_not_taken_off_is_warned_of_and_gamma_is_remembered(tmp_path: Path, caplog):
    data = Mixtures(offset=3.0)
    gamma = data.statistics(512).gamma
    assert gamma > 1
    with caplog.at_level(logging.WARNING):
        sae = train_sae(TOPK, data, run_in(tmp_path / "centred", TOPK), metadata=METADATA)
        assert not caplog.records
        off = replace(TOPK, centre=False)
        train_sae(off, data, run_in(tmp_path / "off", off), metadata=METADATA)
        assert "predicts dead features" in caplog.text
    assert sae.metadata.extra["gamma"] == pytest.approx(gamma)
    assert load_sae(tmp_path / "centred").metadata.extra["gamma"] == pytest.approx(gamma)


def test_new_settings_survive_the_way_through_files():
    config = replace(
        RELU, target_l0=3.0, ema_decay=0.99, on_nonfinite="skip", more_hooks=("a",), second_store="stacked"
    )
    assert configs.from_mapping(TrainConfig, configs.to_mapping(config)) == config
