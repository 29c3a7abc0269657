"""Transcoders, crosscoders and difference SAEs from stores to published SAEs: they learn, and resume byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from saelab import atomic, rundir
from saelab import config as configs
from saelab.activations.capture import CacheConfig, capture
from saelab.activations.slots import Slot, SlotBatches
from saelab.activations.stacked import DifferenceBatches, StackedBatches
from saelab.activations.store import ActivationStore
from saelab.activations.text import TextConfig
from saelab.errors import ConfigError
from saelab.models.load import Model, load_model
from saelab.models.tiny import write_tiny_model
from saelab.rundir import StageWriter
from saelab.sae.architectures import AnyConfig
from saelab.sae.base import SAE, Source
from saelab.sae.crosscoder import CrosscoderConfig
from saelab.sae.matryoshka import MatryoshkaConfig
from saelab.sae.topk import TopKConfig
from saelab.sae.transcoder import TranscoderConfig
from saelab.train import provenance
from saelab.train.config import TrainConfig
from saelab.train.loop import train_sae
from saelab.train.normaliser import Normaliser
from saelab.train.optim import OptimConfig
from saelab.train.trainer import Trainer

INPUT, OUTPUT = "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"
BATCH = 128


@pytest.fixture(scope="module")
def stores(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[ActivationStore, ActivationStore]:
    """The same tokens read by two models."""
    folder = tmp_path_factory.mktemp("slots")
    lines = [
        {"text": f"The river of city {i} is old. " + "Its water was more than the sea. " * (i % 7)} for i in range(60)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = CacheConfig(
        hook_names=(INPUT, OUTPUT),
        text=TextConfig(source=str(folder / "text.jsonl")),
        context=32,
        held_out=0.2,
        dtype="float32",
    )
    second = load_model(write_tiny_model(folder / "second", seed=1), device="cpu")
    capture(config, folder / "first_acts", model=tiny_model)
    capture(config, folder / "second_acts", model=second)
    return ActivationStore.open(folder / "first_acts"), ActivationStore.open(folder / "second_acts")


def settings(sae: AnyConfig) -> TrainConfig:
    return TrainConfig(
        sae=sae,  # type: ignore[arg-type]
        tokens=BATCH * 50,
        batch_size=BATCH,
        optim=OptimConfig(lr=1e-2),
        stats_tokens=1000,
        checkpoint_every=20,
        log_every=1,
        dead_after_tokens=BATCH * 10,
    )


Make = Callable[[tuple[ActivationStore, ActivationStore]], SlotBatches]


def hooks(stores: tuple[ActivationStore, ActivationStore]) -> SlotBatches:
    return StackedBatches([Slot(stores[0], INPUT), Slot(stores[0], OUTPUT)], batch_size=BATCH, seed=0)


def models(stores: tuple[ActivationStore, ActivationStore]) -> SlotBatches:
    return StackedBatches([Slot(store, OUTPUT) for store in stores], batch_size=BATCH, seed=0)


def differences(stores: tuple[ActivationStore, ActivationStore]) -> SlotBatches:
    return DifferenceBatches(*stores, OUTPUT, batch_size=BATCH, seed=0)


CASES = {
    "skip transcoder": (TranscoderConfig(d_sae=128, k=8, skip=True), hooks),
    "batchtopk transcoder": (TranscoderConfig(d_sae=128, k=8, activation="batchtopk"), hooks),
    "crosscoder": (CrosscoderConfig(d_sae=128, k=8, n_exclusive=16), models),
    "l1 crosscoder": (CrosscoderConfig(d_sae=128, sparsity="l1", l1_coefficient=0.05), hooks),
    "difference": (TopKConfig(d_sae=128, k=8), differences),
    "random prefixes": (MatryoshkaConfig(d_sae=128, k=8, random_prefixes=4), differences),
}


def advanced(config: TrainConfig, data: SlotBatches) -> Trainer:
    trainer = Trainer(config, data, "cpu")
    while not trainer.finished:
        trainer.advance(data.at(trainer.step))
    return trainer


@pytest.mark.parametrize("name", CASES)
def test_training_explains_most_of_what_it_reads(stores: tuple[ActivationStore, ActivationStore], name: str):
    config, make = CASES[name]
    data = make(stores)
    trainer = advanced(settings(config), data)
    sae = trainer.finish(provenance.of_store(stores[0], OUTPUT))
    acts = data.at(10_000)
    with torch.no_grad():
        recon = sae(sae.read_slots(acts))
    target = acts[:, 1] if config.arch == "transcoder" else acts
    centred = target - target.mean(0)
    unexplained = (recon - target).pow(2).flatten(1).sum() / centred.pow(2).flatten(1).sum()
    assert unexplained < 0.5
    if config.arch == "crosscoder":
        for slot in range(2):
            assert (recon - acts)[:, slot].pow(2).sum() / centred[:, slot].pow(2).sum() < 0.5
        assert torch.equal((sae.W_dec != 0).any(2), sae.membership)


@pytest.mark.parametrize("name", ["skip transcoder", "crosscoder", "random prefixes"])
def test_a_crash_changes_no_byte(stores: tuple[ActivationStore, ActivationStore], name: str, tmp_path: Path):
    config, make = CASES[name]

    def run(path: Path, stop_at: int | None = None) -> SAE:
        data = make(stores)
        read = data.at

        def at(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            return read(step)

        data.at = at  # type: ignore[method-assign]
        resumed = path.exists()
        plain = configs.to_mapping(settings(config))
        writer = (
            StageWriter.resume(path, stage="sae") if resumed else StageWriter.create(path, stage="sae", config=plain)
        )
        return train_sae(settings(config), data, writer, metadata=provenance.of_slots(data.slots))

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "crashed", stop_at=33)
    again = run(tmp_path / "crashed")
    for tensor_name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[tensor_name], tensor), tensor_name
    for file in ("sae_weights.safetensors", "cfg.json"):
        assert atomic.sha256(tmp_path / "crashed" / file) == atomic.sha256(tmp_path / "whole" / file)
    losses = [[line["loss"] for line in rundir.read_metrics(tmp_path / path)] for path in ("whole", "crashed")]
    assert losses[0] == losses[1]


def test_the_normaliser_is_one_for_each_slot_and_is_undone_by_its_inverse(
    stores: tuple[ActivationStore, ActivationStore],
):
    data = hooks(stores)
    normalise = Normaliser.fitted(data.statistics(), centre=True)
    acts = normalise(data.at(0))
    assert normalise.scale.shape == (2,)
    assert normalise.scale[0] != normalise.scale[1]
    torch.testing.assert_close(normalise.inverse(acts), data.at(0), rtol=1e-4, atol=1e-4)
    for slot in range(2):
        assert acts[:, slot].pow(2).sum(1).mean().item() == pytest.approx(32, rel=0.3)


def test_provenance_names_every_source(stores: tuple[ActivationStore, ActivationStore]):
    first, second = stores
    told = provenance.of_slots(hooks(stores).slots)
    assert (told.model_name, told.hook_name, told.reads) == (first.manifest.model.name, INPUT, "activations")
    assert [source.hook_name for source in told.sources] == [INPUT, OUTPUT]
    told = provenance.of_difference(first, second, OUTPUT)
    assert (told.reads, told.hook_name) == ("difference", OUTPUT)
    model = second.manifest.model
    assert told.sources[1] == Source(model_name=model.name, model_sha256=model.sha256, hook_name=OUTPUT)
    assert told.sources[0].model_sha256 != told.sources[1].model_sha256


@pytest.mark.parametrize(
    ("config", "make"),
    [
        (TopKConfig(d_sae=128, k=8), hooks),
        (TranscoderConfig(d_sae=128, k=8), differences),
        (CrosscoderConfig(d_sae=128, k=8, n_slots=3), hooks),
    ],
)
def test_batches_with_other_slots_than_the_architecture_reads_are_refused(
    stores: tuple[ActivationStore, ActivationStore], config, make
):
    with pytest.raises(ConfigError, match="activations a token, but the batches hold"):
        Trainer(settings(config), make(stores), "cpu")
