from __future__ import annotations

import json
import signal

import numpy as np
import pytest
import torch

from saelab import config as configs
from saelab.activations.text import TextConfig
from saelab.checkpoint import Checkpoints
from saelab.errors import ArtifactError, ConfigError, Interrupted, TextError, TrainingError
from saelab.interp.lens import logit_lens
from saelab.interp.tuned_lens import STAGE, WEIGHTS, Translator, TunedLens, load_tuned_lens
from saelab.interp.tuned_lens_training import (
    TunedLensConfig,
    _split,
    least_squares,
    lens_kl,
    measure,
    train_tuned_lens,
)
from saelab.interp.unembedding import Unembedding, residual_hooks
from saelab.rundir import StageWriter

WORDS = ["the", "of", "and", "to", "in", "is", "tower", "river", "king", "music", "light", "old", "sea", "north"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 60))}) for _ in range(60)]
    path.write_text("\n".join(lines), "utf-8")
    return path


def config_of(text_file, **changed) -> TunedLensConfig:
    settings = {
        "model": "tiny",
        "text": TextConfig(source=str(text_file)),
        "tokens": 2000,
        "held_out_tokens": 400,
        "held_out": 0.3,
        "context": 24,
        "batch_rows": 4,
        "checkpoint_every": 8,
    }
    return TunedLensConfig(**settings | changed)


def begun(path, config) -> StageWriter:
    return StageWriter.create(path, stage=STAGE, config=configs.to_mapping(config))


@pytest.fixture(scope="module")
def trained(tiny_model, text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("lens") / "lens"
    config = config_of(text_file)
    lens, found = train_tuned_lens(config, tiny_model, begun(path, config))
    return path, lens, found


def test_training_brings_every_layer_but_the_last_nearer_to_the_model(trained):
    _, _, found = trained
    for layer in found.layers[:-1]:
        assert layer.tuned.value < layer.logit.value
        assert layer.difference.high < 0
        assert layer.difference.value == pytest.approx(layer.tuned.value - layer.logit.value)
    last = found.layers[-1]
    assert (last.logit.value, last.tuned.value) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert found.layers[-2].tuned.value < found.constant.value


def test_gradients_improve_on_least_squares(trained, tiny_model, text_file):
    _, _, found = trained
    train, held_out = _split(config_of(text_file), tiny_model)
    unembedding = Unembedding(tiny_model)
    start = least_squares(TunedLens.identity(tiny_model), unembedding, train)
    before = measure(start, unembedding, held_out, torch.zeros(tiny_model.d_vocab), batch_rows=8)
    assert all(a.tuned.value < b.tuned.value for a, b in zip(found.layers[:-1], before.layers, strict=False))
    assert all(b.tuned.value < b.logit.value for b in before.layers[:-1])


def test_training_begins_at_the_logit_lens_if_asked(tiny_model, text_file, tmp_path):
    config = config_of(text_file, start="identity", tokens=90)
    train_tuned_lens(config, tiny_model, begun(tmp_path / "lens", config))
    first = json.loads((tmp_path / "lens" / "metrics.jsonl").read_text().splitlines()[0])
    train, _ = _split(config, tiny_model)
    unembedding = Unembedding(tiny_model)
    from saelab.activations.permutation import mixed_key, permuted

    rows = permuted(np.arange(len(train.tokens)), len(train.tokens), mixed_key(0, 0))[:4]
    hook = residual_hooks(tiny_model)[1]
    acts = tiny_model.capture(torch.from_numpy(train.tokens[rows]).long(), [hook, unembedding.last_hook])
    logps = unembedding.logits(acts[unembedding.last_hook][:, 1:].flatten(0, 1)).log_softmax(-1)
    expected = lens_kl(logps, unembedding.logits(acts[hook][:, 1:].flatten(0, 1))).mean()
    assert first[f"lens_kl/{hook}"] == pytest.approx(float(expected), rel=1e-4)


def test_least_squares_finds_an_affine_map_exactly(tiny_model):
    """Residuals that are an affine map of one another: the ridge is small beside them, so the map comes out."""
    from saelab.interp.tuned_lens_training import _Fit

    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(4000, 8, generator=generator) + 2
    weight, bias = torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)
    fit = _Fit(Translator(torch.zeros(8, 8), torch.zeros(8)))
    for part in x.split(500):
        fit.add(part, part + part @ weight + bias)
    found = fit.solved()
    torch.testing.assert_close(found.weight, weight, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(found(x), x + x @ weight + bias, rtol=1e-2, atol=3e-2)


def test_few_tokens_stay_near_the_identity():
    """Fewer tokens than dimensions: what they do not show is left as it is."""
    from saelab.interp.tuned_lens_training import _Fit

    x = torch.zeros(6, 8)
    x[:, 0] = torch.arange(6.0)
    fit = _Fit(Translator(torch.zeros(8, 8), torch.zeros(8)))
    fit.add(x, 2 * x)
    found = fit.solved()
    unseen = torch.zeros(8)
    unseen[5] = 1.0
    torch.testing.assert_close(found.direction(unseen), unseen, rtol=0, atol=1e-6)
    assert float(found.weight[0, 0]) == pytest.approx(1.0, abs=1e-2)


def test_a_constant_lens_is_measured_beside(trained, tiny_model, text_file):
    """By hand: the mean KL of the model's distributions to the given one."""
    _, held_out = _split(config_of(text_file), tiny_model)
    unembedding = Unembedding(tiny_model)
    uniform = torch.full((tiny_model.d_vocab,), -np.log(tiny_model.d_vocab))
    found = measure(TunedLens.identity(tiny_model), unembedding, held_out, uniform, batch_rows=3)
    logps = tiny_model.logits(torch.from_numpy(held_out.tokens).long())[:, 1:].log_softmax(-1).double()
    expected = (logps.exp() * logps).sum(-1).mean() + np.log(tiny_model.d_vocab)
    assert found.constant.value == pytest.approx(float(expected), rel=1e-4)
    assert found.n_tokens == logps[..., 0].numel()
    assert found.n_documents == len(np.unique(held_out.doc[:, 1:]))
    assert all(layer.difference == (0.0, 0.0, 0.0) for layer in found.layers)


def test_training_and_held_out_text_have_no_document_in_common(tiny_model, text_file):
    train, held_out = _split(config_of(text_file), tiny_model)
    assert not set(train.doc.flatten()) & set(held_out.doc.flatten())
    assert len(train.tokens) <= config_of(text_file).n_steps * 4
    assert not train.held_out.any()
    assert held_out.held_out.all()


class _StopAt:
    """A progress report that presses Ctrl-C at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, done: int, total: int, detail: str) -> None:
        if done == self.step:
            signal.raise_signal(signal.SIGINT)


def test_a_stopped_training_goes_on_to_the_same_bytes(trained, tiny_model, text_file, tmp_path):
    whole, _, _ = trained
    path = tmp_path / "lens"
    config = config_of(text_file)
    with pytest.raises(Interrupted, match="saelab lens --resume"):
        train_tuned_lens(config, tiny_model, begun(path, config), progress=_StopAt(11))
    assert Checkpoints(path / "checkpoints").steps() == [8, 11]
    assert not (path / "DONE").exists()
    train_tuned_lens(config, tiny_model, StageWriter.resume(path, stage=STAGE))
    for name in (WEIGHTS, "lens.json", "metrics.jsonl"):
        assert (path / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_tuned_lens_is_saved_and_read(trained, tiny_model):
    path, lens, found = trained
    for place in (path, path.parent):  # itself, or its workspace
        read = load_tuned_lens(place, tiny_model)
        for hook in residual_hooks(tiny_model)[:-1]:
            for part in ("weight", "bias"):
                ours, theirs = getattr(read.translator(hook), part), getattr(lens.translator(hook), part)
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    about = json.loads((path / "lens.json").read_text())
    assert about["layers"][1]["tuned_kl"]["value"] == found.layers[1].tuned.value
    reading = logit_lens(tiny_model, "the old tower of the king", tuned=read)
    plain = logit_lens(tiny_model, "the old tower of the king")
    assert float(reading.kl[:-1, 1:].mean()) < float(plain.kl[:-1, 1:].mean())


def test_damage_and_another_model_are_noticed(trained, tiny_model, tmp_path):
    import shutil
    from dataclasses import replace

    path = tmp_path / "lens"
    shutil.copytree(trained[0], path)
    with pytest.raises(ArtifactError, match="was trained on"):
        replace(trained[1], model_sha256="0" * 64).check_model(tiny_model)
    data = bytearray((path / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (path / WEIGHTS).write_bytes(data)
    with pytest.raises(ArtifactError, match="differs from its checksum"):
        load_tuned_lens(path, tiny_model)
    (path / "DONE").unlink()
    with pytest.raises(ArtifactError, match=r"unfinished at step .* saelab lens --resume"):
        load_tuned_lens(path, tiny_model)


def test_a_loss_that_is_no_number_stops_the_training(tiny_model, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "saelab.interp.tuned_lens_training.lens_kl", lambda logps, logits: lens_kl(logps, logits) * float("nan")
    )
    config = config_of(text_file)
    with pytest.raises(TrainingError, match="became nan at step 0; lower lr"):
        train_tuned_lens(config, tiny_model, begun(tmp_path / "lens", config))


def test_text_without_a_held_out_row_is_refused(tiny_model, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("the river " * 200)
    with pytest.raises(TextError, match=r"gives no (training|held-out) row"):
        _split(config_of(path), tiny_model)


@pytest.mark.parametrize(
    "changed", [{"tokens": 0}, {"lr": 2.0}, {"held_out": 0.0}, {"context": 1}, {"warmup_share": 1.0}]
)
def test_impossible_settings_are_refused(text_file, changed):
    with pytest.raises(ConfigError, match=next(iter(changed))):
        config_of(text_file, **changed)


@pytest.mark.demo
@pytest.mark.long
def test_the_tuned_lens_is_nearer_to_the_demo_model_at_every_layer_but_the_last(demo_model, tmp_path):
    config = TunedLensConfig(tokens=4096, held_out_tokens=2000)
    _, found = train_tuned_lens(config, demo_model, begun(tmp_path / "lens", config))
    for layer in found.layers:
        print(layer.hook_name, *(f"{i.value:.3f} ({i.low:.3f} to {i.high:.3f})" for i in layer[1:]))
    print("constant", found.constant, found.n_tokens, found.n_documents)
    assert all(layer.difference.high < 0 for layer in found.layers[:-1])
    assert found.layers[-1].tuned.value == found.layers[-1].logit.value
