"""What may go wrong in a step: numbers that are not finite, memory, the disk, a second writer, changed settings."""

from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from toy_stream import Mixtures, contents, run_in

from saelab import config as configs
from saelab import rundir
from saelab.checkpoint import Checkpoints
from saelab.errors import ArtifactError, ConfigError, TrainingError
from saelab.metrics import METRICS
from saelab.rundir import StageWriter, only_writer
from saelab.sae.abstopk import AbsTopKConfig
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.crosscoder import CrosscoderConfig
from saelab.sae.gated import GatedConfig
from saelab.sae.jumprelu import JumpReLUConfig
from saelab.sae.matching_pursuit import MatchingPursuitConfig
from saelab.sae.matryoshka import MatryoshkaConfig
from saelab.sae.panneal import PAnnealConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig
from saelab.sae.transcoder import TranscoderConfig
from saelab.train import trainer as trainer_module
from saelab.train.config import TrainConfig
from saelab.train.halves import backward_in_halves, can_be_halved
from saelab.train.loop import train_sae
from saelab.train.nonfinite import is_finite
from saelab.train.optim import OptimConfig
from saelab.train.trainer import Trainer

METADATA = Metadata(model_name="none", hook_name="blocks.0.hook_resid_post")
BASE = TrainConfig(
    sae=TopKConfig(d_sae=40, k=3),
    tokens=64 * 30,
    batch_size=64,
    optim=OptimConfig(lr=3e-3),
    stats_tokens=512,
    checkpoint_every=10,
    log_every=1,
    dead_after_tokens=320,  # so that AuxK takes part
)
ARCHITECTURES = [TopKConfig(d_sae=40, k=3), BatchTopKConfig(d_sae=40, k=3), ReLUConfig(d_sae=40, l1_coefficient=0.05)]


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.tensors().items() if name != "counters"}


# p-annealing writes into buffers whatever the loss is
SKIPPED = [*ARCHITECTURES, PAnnealConfig(d_sae=40), MatryoshkaConfig(d_sae=40, k=3), JumpReLUConfig(d_sae=40)]


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("sae", SKIPPED, ids=lambda config: config.arch)
def test_a_skipped_batch_leaves_every_bit_of_the_state_unchanged(sae, path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    control = {"target_l0": 4.0} if sae.arch == "relu" else {}
    config = replace(BASE, sae=sae, on_nonfinite="skip", ema_decay=0.9, **control)
    data = Mixtures(poisoned=(7, 8))
    trainer = Trainer(config, data, "cpu")
    for step in range(7):
        trainer.advance(data.at(step))
    before = state_of(trainer)
    for step in (7, 8):
        trainer.record(trainer.advance(data.at(step)))
    after = state_of(trainer)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (trainer.step, trainer.n_skipped, trainer.skipped_in_a_row) == (9, 2, 2)
    trainer.advance(data.at(9))
    assert (trainer.n_skipped, trainer.skipped_in_a_row) == (2, 0)


def test_skipped_batches_are_counted_in_the_metrics_and_too_many_in_a_row_stop(tmp_path: Path):
    config = replace(BASE, on_nonfinite="skip", max_skips=2)
    train_sae(config, Mixtures(poisoned=(4, 11, 12)), run_in(tmp_path / "some", config), metadata=METADATA)
    lines = rundir.read_metrics(tmp_path / "some")
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert [line["n_skipped"] for line in lines] == [0] * 4 + [1] * 7 + [2] + [3] * 18
    assert "loss" not in lines[4]
    assert {name for line in lines for name in line} <= {*METRICS, "step", "tokens"}
    with pytest.raises(TrainingError, match=r"at step 13 .*after 2 skipped batches in a row"):
        train_sae(config, Mixtures(poisoned=(11, 12, 13)), run_in(tmp_path / "many", config), metadata=METADATA)


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_by_default_the_batch_is_written_to_a_file_and_named(tmp_path: Path, path: str, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    with pytest.raises(TrainingError, match=r"1 of its activations .*; the batch is in .*step_000000017.safetensors"):
        train_sae(BASE, Mixtures(poisoned=(17,)), run_in(tmp_path / "sae", BASE), metadata=METADATA)
    dump = load_file(tmp_path / "sae" / "nonfinite_step_000000017.safetensors")
    assert dump["acts"].isnan().nonzero().tolist() == [[3, 0]]
    assert dump["step"] == 17
    assert dump["positions"].tolist() == list(range(17 * 64, 18 * 64))


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_a_gradient_that_is_not_finite_is_noticed_before_it_reaches_the_weights(path: str, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    trainer = Trainer(replace(BASE, on_nonfinite="skip"), Mixtures(), "cpu")
    trainer.advance(Mixtures().at(0))
    before = state_of(trainer)
    spoil = torch.full((64, 16), math.inf)
    if path == "cpu":
        original = trainer.sae.training_gradient

        def gradient(*args, **kwargs):
            made = original(*args, **kwargs)
            return made._replace(sparse=made.sparse._replace(recon_grad=spoil))

        monkeypatch.setattr(trainer.sae, "training_gradient", gradient)
    else:
        monkeypatch.setattr(trainer.sae, "project_decoder_grad_", lambda: trainer.sae.W_dec.grad.fill_(math.inf))
    assert torch.isfinite(trainer.advance(Mixtures().at(1)).total)  # the loss says nothing
    assert trainer.n_skipped == 1
    assert all(torch.equal(before[name], value) for name, value in state_of(trainer).items())


def test_the_bound_that_calls_a_gradient_finite_lets_usual_ones_pass():
    trainer = Trainer(BASE, Mixtures(), "cpu")
    if not trainer.sparse_gradients:
        pytest.skip("dense gradients are faster here")
    gradient = trainer.sae.training_gradient(Mixtures().at(0))
    assert is_finite(gradient.sparse)
    for name in ("top_acts", "pre_grad", "recon_grad", "centred", "b_enc", "b_dec"):
        spoiled = getattr(gradient.sparse, name).clone()
        spoiled.view(-1)[0] = math.nan
        assert not is_finite(gradient.sparse._replace(**{name: spoiled}))


# memory


def gradients(sae) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters() if parameter.grad is not None}


HALVED = [
    TopKConfig(d_sae=40, k=3),
    AbsTopKConfig(d_sae=40, k=3),
    ReLUConfig(d_sae=40),
    GatedConfig(d_sae=40),
    JumpReLUConfig(d_sae=40, pre_act_coefficient=0.1),
    MatchingPursuitConfig(d_sae=40),
    TranscoderConfig(d_sae=40, activation="relu", skip=True),
    CrosscoderConfig(d_sae=40, sparsity="l1"),
]


@pytest.mark.parametrize("config", HALVED, ids=lambda config: config.arch)
@pytest.mark.parametrize("n_tokens", [64, 63])
def test_two_halves_give_the_gradient_of_the_whole(config, n_tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAELAB_KERNELS", "reference")
    assert can_be_halved(config)
    sae = new_sae(config, d_in=16, generator=torch.Generator().manual_seed(0)).double()
    vectors = [Mixtures().at(step)[:n_tokens].double() for step in range(sae.n_slots or 1)]
    acts = torch.stack(vectors, 1) if sae.n_slots else vectors[0]
    dead = torch.zeros(40, dtype=torch.bool)
    dead[::3] = True
    whole = sae.training_loss(acts, dead=dead, progress=0.5)
    whole.total.backward()
    expected = gradients(sae)
    sae.zero_grad()
    halves = backward_in_halves(sae, acts, dead=dead, progress=0.5)
    assert gradients(sae).keys() == expected.keys()
    for name, gradient in gradients(sae).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-12)
    for name in ("total", "reconstruction", "sparsity", "aux", "l0"):
        torch.testing.assert_close(getattr(halves, name), getattr(whole, name).detach(), check_dtype=False)
    assert torch.equal(halves.fired, whole.fired)
    assert (whole.aux > 0) == (config.arch in ("topk", "abstopk", "gated", "jumprelu"))


@pytest.mark.parametrize(
    "config",
    [
        BatchTopKConfig(d_sae=40, k=3),
        MatryoshkaConfig(d_sae=40, k=3),
        PAnnealConfig(d_sae=40),
        JumpReLUConfig(d_sae=40, penalty="quadratic", target_l0=3.0),
        TranscoderConfig(d_sae=40, activation="batchtopk", k=3),
        CrosscoderConfig(d_sae=40, k=3),
    ],
    ids=lambda config: config.arch,
)
def test_a_batch_that_decides_together_is_never_halved(config):
    assert not can_be_halved(config)


def runs_out(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, *, above: int) -> list[int]:
    """From now on a batch of more than ``above`` tokens does not fit; returns the sizes that were tried."""
    tried: list[int] = []
    for name in ("training_loss", "training_gradient"):
        original = getattr(trainer.sae, name)

        def limited(acts, *args, original=original, **kwargs):
            tried.append(len(acts))
            if len(acts) > above:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(acts, *args, **kwargs)

        monkeypatch.setattr(trainer.sae, name, limited)
    return tried


@pytest.mark.parametrize("sae", [ARCHITECTURES[0], ARCHITECTURES[2]], ids=lambda config: config.arch)
def test_running_out_of_memory_once_halves_the_batch_and_changes_nothing_else(sae, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("saelab_kernels.dispatch.bfloat16_units", lambda _: False)
    config = replace(BASE, sae=sae)
    whole, halved = (Trainer(config, Mixtures(), "cpu") for _ in range(2))
    tried = runs_out(halved, monkeypatch, above=32)
    for step in range(20):
        expected, got = whole.advance(Mixtures().at(step)), halved.advance(Mixtures().at(step))
        torch.testing.assert_close(got.total, expected.total, rtol=1e-4, atol=1e-6)
    assert tried.count(64) == 1
    for ours, theirs in zip(halved.sae.parameters(), whole.sae.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    saved = halved.tensors()
    assert saved["counters"].tolist() == [0, 0, 1]  # a resumed run does not have to run out again


def test_running_out_of_memory_in_halves_too_ends_with_a_checkpoint_and_a_sentence(tmp_path: Path, monkeypatch):
    made: list[Trainer] = []

    class Watched(Trainer):
        def advance(self, raw_acts):
            if self.step == 13 and not made:
                made.append(self)
                runs_out(self, monkeypatch, above=16)
            return super().advance(raw_acts)

    monkeypatch.setattr("saelab.train.loop.Trainer", Watched)
    with pytest.raises(TrainingError, match=r"step 13 does not fit .*not even in two halves; .*checkpoint of step 13"):
        train_sae(BASE, Mixtures(), run_in(tmp_path / "sae", BASE), metadata=METADATA)
    assert Checkpoints(tmp_path / "sae" / "checkpoints").steps()[-1] == 13
    monkeypatch.setattr("saelab.train.loop.Trainer", Trainer)
    train_sae(BASE, Mixtures(), StageWriter.resume(tmp_path / "sae", stage="sae"), metadata=METADATA)
    assert [line["step"] for line in rundir.read_metrics(tmp_path / "sae")] == list(range(1, 31))


def test_a_loss_of_the_whole_batch_is_not_halved(monkeypatch: pytest.MonkeyPatch):
    trainer = Trainer(replace(BASE, sae=BatchTopKConfig(d_sae=40, k=3)), Mixtures(), "cpu")
    trainer.advance(Mixtures().at(0))
    before = state_of(trainer)
    runs_out(trainer, monkeypatch, above=63)
    with pytest.raises(trainer_module.OutOfMemory, match=r"loss of 'batchtopk' is one of the whole batch"):
        trainer.advance(Mixtures().at(1))
    assert all(torch.equal(before[name], value) for name, value in state_of(trainer).items())


# disk, writers, settings


def test_a_full_disk_leaves_the_checkpoint_before_loadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = tmp_path / "whole"
    train_sae(BASE, Mixtures(), run_in(whole, BASE), metadata=METADATA)
    save, n_calls = safetensors.torch.save_file, []

    def full(tensors, path):
        n_calls.append(path)
        if len(n_calls) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    out = tmp_path / "sae"
    with pytest.raises(ArtifactError, match=r"no space left to write .*step_000000020"):
        train_sae(BASE, Mixtures(), run_in(out, BASE), metadata=METADATA)
    assert Checkpoints(out / "checkpoints").latest().step == 10
    assert not list(out.rglob("*.part-*"))
    train_sae(BASE, Mixtures(), StageWriter.resume(out, stage="sae"), metadata=METADATA)
    assert contents(out) == contents(whole)


def test_a_full_disk_at_the_metrics_leaves_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out, log = tmp_path / "sae", StageWriter.log

    def torn(self: StageWriter, record) -> None:
        if record["step"] == 17:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write('{"step": 17, "lo')
            raise ArtifactError("no space left to write metrics.jsonl; free some disk space")
        log(self, record)

    with monkeypatch.context() as patch, pytest.raises(ArtifactError, match="no space left"):
        patch.setattr(StageWriter, "log", torn)
        train_sae(BASE, Mixtures(), run_in(out, BASE), metadata=METADATA)
    train_sae(BASE, Mixtures(), StageWriter.resume(out, stage="sae"), metadata=METADATA)
    train_sae(BASE, Mixtures(), run_in(tmp_path / "whole", BASE), metadata=METADATA)
    assert contents(out) == contents(tmp_path / "whole")


HOLDER = """
import sys, time
from pathlib import Path
from saelab.rundir import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_until_the_first_is_gone_however_it_ended(tmp_path: Path):
    out = tmp_path / "sae"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(ArtifactError, match=rf"{out} is being written by process {holder.pid} on "),
            only_writer(out),
        ):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with only_writer(out):
        pass
    assert list(tmp_path.iterdir()) == []


def test_changed_settings_are_refused_with_both_values(tmp_path: Path):
    out = tmp_path / "sae"
    with pytest.raises(TrainingError):
        train_sae(BASE, Mixtures(poisoned=(17,)), run_in(out, BASE), metadata=METADATA)
    run = json.loads((out / "run.json").read_text())
    run["config"]["optim"]["lr"] = 0.001
    (out / "run.json").write_text(json.dumps(run))
    edited = configs.from_mapping(TrainConfig, rundir.read_run(out, "sae")["config"])
    with pytest.raises(ConfigError, match=r"was begun with optim.lr = 0.003, but optim.lr = 0.001 is asked for now"):
        train_sae(edited, Mixtures(), StageWriter.resume(out, stage="sae"), metadata=METADATA)


def test_a_metrics_file_is_on_the_disk_before_the_checkpoint_that_follows_it(tmp_path: Path, monkeypatch):
    events: list[str] = []
    flush, save = StageWriter.flush_metrics, Checkpoints.save
    monkeypatch.setattr(StageWriter, "flush_metrics", lambda self: (events.append("metrics"), flush(self))[1])
    monkeypatch.setattr(Checkpoints, "save", lambda self, *args: (events.append("checkpoint"), save(self, *args))[1])
    train_sae(replace(BASE, tokens=64 * 20), Mixtures(), run_in(tmp_path / "sae", BASE), metadata=METADATA)
    assert events == ["metrics", "checkpoint"] * 2


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"ema_decay": 1.0}, "ema_decay must be between 0 and 1"),
        ({"max_skips": 0}, "max_skips must be at least 1"),
        ({"target_l0": 4.0}, "needs an architecture with a sparsity coefficient, but 'topk' has none"),
        ({"target_l0": 40.0}, "target_l0 must be above 0 and below d_sae=40"),
        ({"target_l0": 4.0, "sae": ReLUConfig(d_sae=40, l1_coefficient=0.0)}, "it is set to 0"),
    ],
)
def test_impossible_settings_of_these_are_refused(change: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        replace(BASE, **change)
