"""The end-to-end loss: the divergence by hand, its gradient, the frozen model, training and resuming with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saelab import atomic, rundir
from saelab import config as configs
from saelab.activations.capture import CacheConfig, capture
from saelab.activations.loader import Batches
from saelab.activations.store import ActivationStore
from saelab.activations.text import TextConfig
from saelab.errors import ArtifactError, ConfigError
from saelab.models.load import Model, load_model
from saelab.models.tiny import write_tiny_model
from saelab.rundir import StageWriter
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig
from saelab.train.config import TrainConfig
from saelab.train.end_to_end import EndToEndConfig, OutputLoss, StoredRows, token_kl
from saelab.train.loop import train_sae
from saelab.train.normaliser import Normaliser
from saelab.train.optim import OptimConfig
from saelab.train.trainer import Trainer

HOOK = "blocks.1.hook_resid_post"
D_IN = 32
CONFIG = TrainConfig(
    sae=TopKConfig(d_sae=128, k=8),
    tokens=64 * 24,
    batch_size=64,
    optim=OptimConfig(lr=5e-3),
    stats_tokens=512,
    checkpoint_every=10,
    log_every=1,
    end_to_end=EndToEndConfig(coefficient=0.5, rows=2),
)


@pytest.fixture(scope="module")
def store(tiny_model: Model, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    folder = tmp_path_factory.mktemp("end_to_end")
    lines = [
        {"text": f"The river of city {i} is old. " + "Its water was more than the sea. " * (i % 5)} for i in range(40)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = CacheConfig(
        hook_names=(HOOK,),
        text=TextConfig(source=str(folder / "text.jsonl")),
        context=16,
        held_out=0.2,
        dtype="float32",
    )
    capture(config, folder / "activations", model=tiny_model)
    return ActivationStore.open(folder / "activations")


def output_loss(store: ActivationStore, model: Model, **settings: object) -> OutputLoss:
    assert CONFIG.end_to_end is not None
    return OutputLoss.on_store(CONFIG.end_to_end, store, model, HOOK, seed=0, **settings)  # type: ignore[arg-type]


def batches(store: ActivationStore) -> Batches:
    return Batches(store, HOOK, batch_size=CONFIG.batch_size, seed=0)


def normaliser(store: ActivationStore) -> Normaliser:
    return Normaliser.fitted(batches(store).statistics(512), centre=True)


def identity():
    """An SAE that gives back its input: a feature for each direction of each axis."""
    sae = new_sae(ReLUConfig(d_sae=2 * D_IN), d_in=D_IN)
    with torch.no_grad():
        both = torch.cat([torch.eye(D_IN), -torch.eye(D_IN)])
        sae.encoder.copy_(both)
        sae.W_dec.copy_(both)
    return sae


def test_the_divergence_of_logits_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    kl = token_kl(p.log() + 3, q.log() - 1)
    torch.testing.assert_close(kl, torch.tensor([0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75), 0.0], dtype=torch.float32))


def test_the_divergence_is_that_of_the_model_with_the_reconstruction_in_place(
    tiny_model: Model, store: ActivationStore
):
    sae = new_sae(TopKConfig(d_sae=128, k=4), d_in=D_IN, generator=torch.Generator().manual_seed(0))
    normalise = normaliser(store)
    kl = output_loss(store, tiny_model).divergence(sae, normalise, step=3)
    ids = StoredRows(store, n_rows=2, seed=0).at(3)
    with torch.no_grad():
        raw = tiny_model.capture(ids, [HOOK])[HOOK].flatten(0, 1)
        recon = (sae((raw - normalise.mean) * normalise.scale) / normalise.scale + normalise.mean).view(2, 16, D_IN)
        with tiny_model.edit(HOOK, lambda acts, keep: recon):
            q = tiny_model.logits(ids).double().log_softmax(-1)
        p = tiny_model.logits(ids).double().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)[:, 1:].mean()
    assert kl.item() == pytest.approx(expected.item(), rel=1e-4)
    assert expected > 0.01
    assert (p.exp() * (p - q)).sum(-1)[:, 0].abs().max() < 1e-6  # BOS keeps its activations


def test_a_perfect_reconstruction_changes_nothing(tiny_model: Model, store: ActivationStore):
    kl = output_loss(store, tiny_model).divergence(identity(), normaliser(store), step=0)
    assert abs(kl.item()) < 1e-5


def test_gradients_reach_the_sae_and_agree_with_differences_while_the_model_stays_frozen(
    tiny_model: Model, store: ActivationStore
):
    sae = new_sae(ReLUConfig(d_sae=48), d_in=D_IN, generator=torch.Generator().manual_seed(0))
    loss, normalise = output_loss(store, tiny_model), normaliser(store)
    loss.divergence(sae, normalise, step=0).backward()
    assert all(parameter.grad is None for parameter in tiny_model.bridge.parameters())
    assert not tiny_model.active_hooks()
    for name in ("encoder", "W_dec", "b_enc", "b_dec"):
        parameter = sae.get_parameter(name)
        direction = parameter.grad / parameter.grad.norm()
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter += sign * 1e-2 * direction
                values.append(loss.divergence(sae, normalise, step=0).item())
                parameter -= sign * 1e-2 * direction
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(parameter.grad.norm().item(), rel=0.03)


def test_tokens_beyond_the_norm_limit_pass_unchanged(tiny_model: Model, store: ActivationStore):
    sae = new_sae(TopKConfig(d_sae=128, k=4), d_in=D_IN)
    everything = output_loss(store, tiny_model, norm_limit=1e9).divergence(sae, normaliser(store), step=0)
    torch.testing.assert_close(everything, output_loss(store, tiny_model).divergence(sae, normaliser(store), step=0))
    nothing = output_loss(store, tiny_model, norm_limit=1e-9).divergence(sae, normaliser(store), step=0)
    assert abs(nothing.item()) < 1e-6


def test_rows_are_a_function_of_the_step_and_an_epoch_visits_each_once(store: ActivationStore):
    rows = StoredRows(store, n_rows=1, seed=4)
    n = len(store.rows("train"))
    epoch = torch.cat([rows.at(step) for step in range(n)])
    expected = store.tokens(store.rows("train"))
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, expected.tolist()))
    assert torch.equal(StoredRows(store, n_rows=3, seed=4).at(1), epoch[3:6])
    assert not torch.equal(StoredRows(store, n_rows=3, seed=5).at(1), epoch[3:6])


def trained(path: Path, config: TrainConfig, store: ActivationStore, model: Model, stop_at: int | None = None):
    run = (
        StageWriter.resume(path, stage="sae")
        if path.exists()
        else StageWriter.create(path, stage="sae", config=configs.to_mapping(config))
    )
    data = batches(store)
    read = data.at

    def at(step: int) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        return read(step)

    data.at = at  # type: ignore[method-assign]
    loss = None if config.end_to_end is None else output_loss(store, model)
    return train_sae(config, data, run, metadata=Metadata(), output_loss=loss)


@pytest.mark.parametrize(
    "sae_config", [CONFIG.sae, BatchTopKConfig(d_sae=128, k=8, threshold_momentum=0.8)], ids=lambda config: config.arch
)
def test_training_with_it_lowers_the_divergence_more_and_resumes_to_the_same_bytes(
    tiny_model: Model, store: ActivationStore, tmp_path: Path, sae_config
):
    config = replace(CONFIG, sae=sae_config)
    trained(tmp_path / "whole", config, store, tiny_model)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "crashed", config, store, tiny_model, stop_at=15)
    trained(tmp_path / "crashed", config, store, tiny_model)
    for name in ("sae_weights.safetensors", "cfg.json"):
        assert atomic.sha256(tmp_path / "crashed" / name) == atomic.sha256(tmp_path / "whole" / name)
    lines = rundir.read_metrics(tmp_path / "whole")
    assert [line["kl"] for line in lines] == [line["kl"] for line in rundir.read_metrics(tmp_path / "crashed")]
    for line in lines:
        assert line["loss"] == pytest.approx(line["reconstruction"] + line["aux"] + 0.5 * line["kl"], rel=1e-5)
    assert lines[-1]["kl"] < 0.75 * lines[0]["kl"]


def test_the_models_output_is_kept_better_than_by_the_squared_error_alone(tiny_model: Model, store: ActivationStore):
    """Where two features a token are too few for all of the activation, those that the model uses are chosen."""
    held_out = OutputLoss(
        EndToEndConfig(rows=8), tiny_model, HOOK, StoredRows(store, n_rows=8, seed=0, split="held_out")
    )
    kls = []
    for end_to_end in (EndToEndConfig(coefficient=3.0, rows=8), None):
        config = replace(CONFIG, sae=TopKConfig(d_sae=128, k=2), tokens=64 * 50, end_to_end=end_to_end)
        loss = None if end_to_end is None else OutputLoss.on_store(end_to_end, store, tiny_model, HOOK, seed=0)
        data = batches(store)
        trainer = Trainer(config, data, "cpu", output_loss=loss)
        while not trainer.finished:
            trainer.advance(data.at(trainer.step))
        with torch.no_grad():
            kls.append(float(held_out.divergence(trainer.sae, trainer.normalise, step=0)))
    assert kls[0] < 0.85 * kls[1], kls


def test_settings_and_model_belong_together(tiny_model: Model, store: ActivationStore, tmp_path: Path):
    with pytest.raises(ConfigError, match="no model was given to it"):
        Trainer(CONFIG, batches(store), "cpu")
    with pytest.raises(ConfigError, match="end_to_end is not set"):
        Trainer(replace(CONFIG, end_to_end=None), batches(store), "cpu", output_loss=output_loss(store, tiny_model))
    other = load_model(write_tiny_model(tmp_path / "other", seed=1), device="cpu")
    with pytest.raises(ArtifactError, match="give that model"):
        output_loss(store, other)
    with pytest.raises(ConfigError, match=r"holds no activations of blocks.0.hook_resid_post"):
        OutputLoss.on_store(EndToEndConfig(), store, tiny_model, "blocks.0.hook_resid_post", seed=0)


@pytest.mark.parametrize(
    "change",
    [
        {"more_hooks": ("blocks.0.hook_resid_post",)},
        {"second_store": "subtracted"},
        {"live": CacheConfig(hook_names=(HOOK,), text=TextConfig(source="x"))},
    ],
)
def test_more_than_one_hook_of_a_store_is_refused(change):
    with pytest.raises(ConfigError, match="end_to_end needs an SAE that reads one hook of a store"):
        replace(CONFIG, **change)


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match=r"end_to_end.coefficient must be above 0, got 0"):
        EndToEndConfig(coefficient=0.0)
    with pytest.raises(ConfigError, match=r"end_to_end.rows must be at least 1, got 0"):
        EndToEndConfig(rows=0)
