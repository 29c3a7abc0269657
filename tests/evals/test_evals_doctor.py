"""Mistakes put into SAEs on purpose are found and named, and good SAEs pass."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from saelab.activations.capture import capture
from saelab.activations.loader import Batches
from saelab.activations.moments import moments
from saelab.activations.settings import CacheConfig
from saelab.activations.store import ActivationStore
from saelab.activations.text import TextConfig, open_text
from saelab.errors import ArtifactError, ConfigError
from saelab.evals.doctor import as_plain, diagnose, expected_l0
from saelab.evals.examination import (
    AS_GIVEN,
    ScanConfig,
    fit_between,
    neighbours,
    pca_explained,
    reconstructed,
    residual_share,
    turned,
)
from saelab.evals.readings import bias_mistakes, scalings, weight_mistakes, with_weights
from saelab.models.load import load_model
from saelab.models.tiny import WORDS, write_tiny_model
from saelab.sae.architectures import AnyConfig
from saelab.sae.base import SAE, Metadata
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.io import load_sae, save_sae, save_sae_as
from saelab.sae.matryoshka import MatryoshkaConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopK, TopKConfig
from saelab.train.config import TrainConfig
from saelab.train.optim import OptimConfig
from saelab.train.provenance import of_store
from saelab.train.trainer import Trainer

HOOK = "blocks.1.hook_resid_post"


def trained(
    store: ActivationStore, hook: str, config: AnyConfig, *, tokens: int, batch_size: int = 512, lr: float = 3e-3
) -> SAE:
    """A quickly trained SAE, as it would come from a file."""
    settings = TrainConfig(
        sae=config, tokens=tokens, batch_size=batch_size, optim=OptimConfig(lr=lr), stats_tokens=10_000
    )
    return _train(settings, Batches(store, hook, batch_size=batch_size, seed=0), of_store(store, hook))


def _train(settings: TrainConfig, batches: object, metadata: Metadata) -> SAE:
    trainer = Trainer(settings, batches, "cpu")  # type: ignore[arg-type]
    while not trainer.finished:
        trainer.advance(batches.at(trainer.step))  # type: ignore[attr-defined]
    return trainer.finish(metadata).requires_grad_(False)


# --- faults: each turns a good SAE into one that somebody might bring


def at_hook(sae: SAE, hook: str) -> SAE:
    sae = copy.deepcopy(sae)
    sae.metadata = replace(sae.metadata, hook_name=hook)
    return sae


def scaled(sae: SAE, factor: float) -> SAE:
    """An SAE that expects ``factor`` times the activations, because a scale was not folded."""
    sae = copy.deepcopy(sae)
    sae.metadata = replace(sae.metadata, mean_norm=None)
    sae.fold_(torch.zeros(sae.d_in), 1 / factor)
    return sae


def reshaped(sae: SAE, name: str) -> SAE:
    """W_enc [d_in, d_sae] (or W_dec^T) whose memory was given the shape [d_sae, d_in] instead of being transposed."""
    sae = copy.deepcopy(sae)
    matrix = sae.get_parameter(name).data
    sae.get_parameter(name).data = matrix.T.contiguous().reshape(matrix.shape)
    return sae


def exchanged(sae: SAE) -> SAE:
    sae = copy.deepcopy(sae)
    sae.encoder.data, sae.W_dec.data = sae.W_dec.data, sae.encoder.data
    return sae


def negated(sae: SAE, name: str) -> SAE:
    sae = copy.deepcopy(sae)
    sae.get_parameter(name).data.neg_()
    return sae


def biased_twice(sae: SAE) -> SAE:
    """An SAE whose b_enc already holds the image of b_dec, which is subtracted once more."""
    sae = copy.deepcopy(sae)
    sae.b_enc.data.sub_(sae.encoder.data @ sae.b_dec.data)
    return sae


# --- the fast version: the tiny model


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words, draw = WORDS.split(), np.random.default_rng(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("\n\n".join(" ".join(draw.choice(words, 100)) for _ in range(800)), "utf-8")
    return file


@pytest.fixture(scope="module")
def config(text_file: Path) -> ScanConfig:
    return ScanConfig(text=TextConfig(source=str(text_file)), tokens=2048, scan_tokens=1024, context=64)


@pytest.fixture(scope="module")
def store(tiny_model, tiny_model_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory):
    settings = CacheConfig(
        model=str(tiny_model_dir),
        hook_names=(HOOK, "blocks.2.hook_mlp_out"),
        text=TextConfig(source=str(text_file)),
        tokens=40_000,
        context=64,
    )
    return capture(settings, tmp_path_factory.mktemp("store") / "activations", model=tiny_model)


@pytest.fixture(scope="module")
def topk(store: ActivationStore) -> SAE:
    return trained(store, HOOK, TopKConfig(d_sae=128, k=6), tokens=90_000)


@pytest.fixture(scope="module")
def relu(store: ActivationStore) -> SAE:
    return trained(store, HOOK, ReLUConfig(d_sae=96, l1_coefficient=3.0), tokens=90_000)


@pytest.fixture(scope="module")
def square(store: ActivationStore) -> SAE:
    return trained(store, HOOK, TopKConfig(d_sae=32, k=8), tokens=90_000)


def test_good_saes_fit(tiny_model, store, topk: SAE, relu: SAE, square: SAE, config: ScanConfig):
    mlp = trained(store, "blocks.2.hook_mlp_out", BatchTopKConfig(d_sae=128, k=6), tokens=90_000)
    for sae in (topk, relu, square, mlp):
        diagnosis = diagnose(sae, tiny_model, config)
        assert diagnosis.fits, (sae.cfg, diagnosis.sentence)
        assert diagnosis.examination is not None
        assert diagnosis.examination.fit.explained_variance > 0.4
        best = diagnosis.examination.trials[0]
        print(sae.cfg.arch, diagnosis.verdict, f"{best.ratio:.2f}", diagnosis.sentence)


FAULTS: dict[str, tuple[str, str, Callable[[SAE], SAE]]] = {
    "another layer": ("topk", "hook", lambda sae: at_hook(sae, "blocks.2.hook_resid_post")),
    "another place": ("topk", "hook", lambda sae: at_hook(sae, "blocks.1.hook_mlp_out")),
    "twice the scale": ("topk", "scale", lambda sae: scaled(sae, 2.0)),
    "half the scale": ("relu", "scale", lambda sae: scaled(sae, 0.5)),
    "W_dec transposed": ("square", "transpose", lambda sae: reshaped(sae, "W_dec")),
    "W_enc reshaped": ("topk", "transpose", lambda sae: reshaped(sae, "encoder")),
    "W_enc negated": ("topk", "sign", lambda sae: negated(sae, "encoder")),
    "b_dec twice": ("topk", "bias", biased_twice),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_is_named(name: str, tiny_model, config: ScanConfig, request: pytest.FixtureRequest):
    of, suspect, fault = FAULTS[name]
    diagnosis = diagnose(fault(request.getfixturevalue(of)), tiny_model, config)
    print(diagnosis.sentence)
    assert diagnosis.verdict == "does not fit"
    assert diagnosis.suspect == suspect
    assert diagnosis.examination is not None
    assert diagnosis.examination.trials[0].explained_variance > 0.4


def test_an_sae_of_another_model_is_told_apart(topk: SAE, config: ScanConfig, tmp_path: Path):
    other = load_model(write_tiny_model(tmp_path / "other", seed=7), device="cpu")
    diagnosis = diagnose(topk, other, config)
    assert (diagnosis.verdict, diagnosis.suspect) == ("does not fit", "model")
    assert "with other weights" in diagnosis.sentence
    foreign = copy.deepcopy(topk)
    foreign.metadata = replace(foreign.metadata, model_sha256=None, model_name="", mean_norm=None)
    diagnosis = diagnose(foreign, other, config)
    assert (diagnosis.verdict, diagnosis.suspect) == ("does not fit", "model")


def test_an_untrained_sae_does_not_pass(tiny_model, config: ScanConfig):
    random = TopK(TopKConfig(d_sae=128, k=6), 32, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    random.metadata = Metadata(hook_name=HOOK)
    assert not diagnose(random, tiny_model, config).fits


def test_a_width_that_the_hook_does_not_have_decides_at_once(tiny_model, config: ScanConfig):
    narrow, wide = TopK(TopKConfig(d_sae=64, k=4), 17), TopK(TopKConfig(d_sae=64, k=4), 64)
    diagnosis = diagnose(narrow, tiny_model, config, hook_name=HOOK)
    assert (diagnosis.verdict, diagnosis.suspect) == ("does not fit", "model")
    assert "reads vectors of width 17, but blocks.1.hook_resid_post has 32" in diagnosis.sentence
    diagnosis = diagnose(wide, tiny_model, config, hook_name=HOOK)
    assert diagnosis.suspect == "hook"
    assert as_plain(diagnosis)["measured"] == {}


def test_what_the_file_says_is_compared(tiny_model, topk: SAE, config: ScanConfig):
    diagnosis = diagnose(topk, tiny_model, config, expected_l0=100.0)
    assert (diagnosis.verdict, diagnosis.suspect) == ("fits with a caveat", "sparsity")
    louder = copy.deepcopy(topk)
    assert topk.metadata.mean_norm is not None
    louder.metadata = replace(topk.metadata, mean_norm=2 * topk.metadata.mean_norm)
    assert diagnose(louder, tiny_model, config).suspect == "scale"
    tuned = copy.deepcopy(topk)
    tuned.metadata = replace(topk.metadata, model_sha256="0" * 64)
    assert diagnose(tuned, tiny_model, config).suspect == "model"
    assert diagnose(tuned, tiny_model, config).fits


def test_few_tokens_give_no_verdict(tiny_model, topk: SAE, config: ScanConfig):
    few = replace(config, tokens=128, scan_tokens=128)
    assert diagnose(topk, tiny_model, few).verdict == "cannot tell"


def test_questions_that_cannot_be_asked(tiny_model, topk: SAE, config: ScanConfig):
    nameless = copy.deepcopy(topk)
    nameless.metadata = Metadata()
    with pytest.raises(ConfigError, match="give one with --hook"):
        diagnose(nameless, tiny_model, config)
    with pytest.raises(ConfigError, match=r"has no hook blocks\.9"):
        diagnose(topk, tiny_model, config, hook_name="blocks.9.hook_resid_post")
    broken = copy.deepcopy(topk)
    broken.b_dec.data[0] = torch.nan
    with pytest.raises(ArtifactError, match="values that are no numbers"):
        diagnose(broken, tiny_model, config)
    with pytest.raises(ConfigError, match="at least two rows"):
        ScanConfig(tokens=100)


def test_an_examination_leaves_sae_and_model_as_they_were(tiny_model, topk: SAE, config: ScanConfig):
    before = {name: tensor.clone() for name, tensor in topk.state_dict().items()}
    diagnose(topk, tiny_model, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in topk.state_dict().items())
    assert tiny_model.active_hooks() == []


def test_the_expected_l0_is_what_the_file_says(topk: SAE, tmp_path: Path):
    assert expected_l0(topk, tmp_path) == 6
    relu = copy.deepcopy(topk)
    relu.cfg = ReLUConfig(d_sae=4)  # type: ignore[assignment]
    assert expected_l0(relu, tmp_path) is None
    save_sae(topk, tmp_path, density=torch.full((128,), 0.25))
    assert expected_l0(relu, tmp_path) == pytest.approx(32, rel=1e-4)
    (tmp_path / "sparsity.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="damaged"):
        expected_l0(relu, tmp_path)


# --- closed forms


def test_a_fit_knows_scale_and_offset():
    acts = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    perfect = fit_between(acts, acts)
    assert (perfect.explained_variance, perfect.slope, perfect.norm_ratio) == pytest.approx((1, 1, 1))
    small = fit_between(acts, acts / 2 + 3)
    assert small.explained_affine == pytest.approx(1)
    assert small.slope == pytest.approx(2)
    assert small.explained_variance < 0
    mean = fit_between(acts, acts.mean(0).expand_as(acts))
    assert mean.explained_variance == pytest.approx(0, abs=1e-6)


def test_turning_keeps_the_spectrum_and_the_mean():
    generator = torch.Generator().manual_seed(1)
    acts = torch.randn(400, 16, generator=generator) * torch.linspace(0.1, 3, 16) + 5
    other = turned(acts, seed=0)
    torch.testing.assert_close(other.mean(0), acts.mean(0), rtol=1e-4, atol=1e-4)
    spectra = [torch.linalg.svdvals(x - x.mean(0)) for x in (acts, other)]
    torch.testing.assert_close(*spectra, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(other, acts, atol=0.5)


def test_principal_components_explain_what_lies_in_them():
    generator = torch.Generator().manual_seed(2)
    plane = torch.randn(600, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    assert pca_explained(plane, rank=3) == pytest.approx(1, abs=1e-4)
    assert pca_explained(plane, rank=1) < 0.9
    assert residual_share(plane, rank=3) == pytest.approx(0, abs=1e-4)
    few = plane[:12]  # fewer tokens than directions
    assert pca_explained(few, rank=3) == pytest.approx(1, abs=1e-4)


def test_every_reading_undoes_its_mistake(topk: SAE, relu: SAE):
    acts = torch.randn(64, 32, generator=torch.Generator().manual_seed(3)) * 4 + 1
    right = topk(acts)
    (double,) = [r for r in scalings(moments([acts])) if r.name == "activations times 2"]
    torch.testing.assert_close(reconstructed(double, scaled(topk, 2.0), acts), right, rtol=1e-4, atol=1e-4)
    for fault in (
        reshaped(topk, "encoder"),
        reshaped(topk, "W_dec"),
        reshaped(reshaped(topk, "encoder"), "W_dec"),
        exchanged(topk),
        negated(topk, "encoder"),
        negated(topk, "W_dec"),
    ):
        found = [reconstructed(reading, fault, acts) for reading in weight_mistakes(fault)]
        assert any(torch.allclose(recon, right, rtol=1e-4, atol=1e-4) for recon in found)
    fault = biased_twice(relu)
    found = [reconstructed(reading, fault, acts) for reading in bias_mistakes(fault)]
    assert any(torch.allclose(recon, relu(acts), rtol=1e-3, atol=1e-3) for recon in found)


def test_weights_come_back_whatever_happens(topk: SAE):
    before = topk.encoder.data
    with pytest.raises(KeyError), with_weights(topk, {"encoder": -before}):
        raise KeyError
    assert topk.encoder.data is before or torch.equal(topk.encoder.data, before)
    assert torch.equal(reconstructed(AS_GIVEN, topk, before[:4]), topk(before[:4]))


def test_neighbours_are_the_hooks_of_the_same_width(tiny_model):
    names = neighbours(tiny_model, HOOK, width=32)
    assert {f"blocks.{i}.hook_{p}" for i in range(3) for p in ("resid_pre", "resid_mid", "resid_post")} <= set(names)
    assert "blocks.0.mlp.hook_pre" not in names


# --- the real model: two of each fault, and ten good SAEs. Capture, training and 20 examinations take a few minutes

PLACES = {
    "r3": "blocks.3.hook_resid_post",
    "mlp6": "blocks.6.hook_mlp_out",
    "attn6": "blocks.6.hook_attn_out",
    "mid8": "blocks.8.hook_resid_mid",
    "r10": "blocks.10.hook_resid_post",
    "r14": "blocks.14.hook_resid_post",
}

GOOD: dict[str, tuple[str, AnyConfig]] = {
    "topk r10": ("r10", TopKConfig(d_sae=2304, k=32)),
    "topk r14": ("r14", TopKConfig(d_sae=2304, k=20)),
    "topk mlp6": ("mlp6", TopKConfig(d_sae=2304, k=64)),
    "topk attn6": ("attn6", TopKConfig(d_sae=2304, k=40)),
    "batchtopk r3": ("r3", BatchTopKConfig(d_sae=2304, k=32)),
    "batchtopk r10": ("r10", BatchTopKConfig(d_sae=2304, k=200)),
    "relu r10": ("r10", ReLUConfig(d_sae=1152, l1_coefficient=2.0)),
    "relu mid8": ("mid8", ReLUConfig(d_sae=1152, l1_coefficient=3.0)),
    "matryoshka r14": ("r14", MatryoshkaConfig(d_sae=1152, k=32)),
    "square r10": ("r10", TopKConfig(d_sae=576, k=32)),
}

#: Good SAEs that are examined after a way through the file format of another tool.
FORMATS = {
    "topk r14": "sparsify",
    "batchtopk r10": "saelens",
    "topk mlp6": "dictionary_learning",
    "relu r10": "saelens",
}


class KeptBos:
    """The mistake in training: every position of a row, BOS among them."""

    def __init__(self, store: ActivationStore, hook: str, batch_size: int) -> None:
        self._acts = store.acts(hook, store.rows("train")).flatten(0, 1)
        self._batch_size = batch_size
        self.d_in = store.d_in(hook)

    def at(self, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        return self._acts[torch.randint(len(self._acts), (self._batch_size,), generator=generator)].float()

    def statistics(self, max_tokens: int):
        return moments([self._acts[:max_tokens].float()])


class Bench(NamedTuple):
    model: object
    store: ActivationStore
    good: dict[str, SAE]
    config: ScanConfig


@pytest.fixture(scope="module")
def bench(demo_model, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """The demo model's activations at six places, ten SAEs on them, and text that none of these has seen."""
    folder = tmp_path_factory.mktemp("bench")
    text = TextConfig(source="demo", max_tokens_per_document=600)
    settings = CacheConfig(model="demo", hook_names=tuple(PLACES.values()), text=text, tokens=40_960, held_out=0.0)
    store = capture(settings, folder / "activations", model=demo_model)
    good = {
        name: trained(store, PLACES[place], config, tokens=100_000, batch_size=1024, lr=2e-3)
        for name, (place, config) in GOOD.items()
    }
    unseen = folder / "unseen.jsonl"
    lines = [json.dumps({"text": document.text[-6000:]}) for document in open_text(TextConfig(source="demo"))]
    unseen.write_text("\n".join(lines[:40]) + "\n", "utf-8")
    return Bench(demo_model, store, good, ScanConfig(text=TextConfig(source=str(unseen)), tokens=2048, scan_tokens=512))


def kept_bos(bench: Bench, config: AnyConfig) -> SAE:
    settings = TrainConfig(sae=config, tokens=100_000, batch_size=1024, optim=OptimConfig(lr=2e-3), stats_tokens=10_000)
    hook = PLACES["r14"]
    return _train(settings, KeptBos(bench.store, hook, 1024), of_store(bench.store, hook))


def of_random_weights(bench: Bench, config: AnyConfig, folder: Path) -> SAE:
    """An SAE of a model with the same shape whose weights were drawn at random."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from saelab.models.demo import demo_model_dir

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        twin = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo_model_dir()))
    twin.save_pretrained(folder / "twin")
    AutoTokenizer.from_pretrained(demo_model_dir()).save_pretrained(folder / "twin")
    hook = PLACES["r10"]
    settings = CacheConfig(
        model=str(folder / "twin"), hook_names=(hook,), text=TextConfig(source="demo"), tokens=20_480, held_out=0.0
    )
    store = capture(settings, folder / "activations")
    sae = trained(store, hook, config, tokens=50_000, batch_size=1024, lr=2e-3)
    sae.metadata = Metadata(hook_name=hook)  # a file that does not say which model it is of
    return sae


@pytest.mark.long
@pytest.mark.demo
def test_faults_are_found_and_good_saes_pass_on_the_real_model(bench: Bench, tmp_path: Path):
    good = bench.good
    faults: dict[str, tuple[str, SAE]] = {
        "wrong layer, one off": ("hook", at_hook(good["topk r10"], "blocks.11.hook_resid_post")),
        "wrong layer, far off": ("hook", at_hook(good["relu r10"], "blocks.3.hook_resid_post")),
        "scale off by 2": ("scale", scaled(good["topk r14"], 2.0)),
        "scale off by 1/2": ("scale", scaled(good["batchtopk r10"], 0.5)),
        "BOS kept, topk": ("bos", kept_bos(bench, TopKConfig(d_sae=2304, k=32))),
        "BOS kept, relu": ("bos", kept_bos(bench, ReLUConfig(d_sae=1152, l1_coefficient=1.0))),
        "wrong model, topk": ("model", of_random_weights(bench, TopKConfig(d_sae=2304, k=32), tmp_path / "a")),
        "wrong model, relu": ("model", of_random_weights(bench, ReLUConfig(d_sae=1152), tmp_path / "b")),
        "wrong transpose, square decoder": ("transpose", reshaped(good["square r10"], "W_dec")),
        "wrong transpose, encoder": ("transpose", reshaped(good["topk r10"], "encoder")),
    }
    found: list[str] = []
    for name, (suspect, sae) in faults.items():
        diagnosis = diagnose(sae, bench.model, bench.config)  # type: ignore[arg-type]
        print(f"{name}: {diagnosis.verdict}: {diagnosis.sentence}")
        if diagnosis.suspect == suspect and diagnosis.verdict != "fits":
            found.append(name)
    passed: list[str] = []
    for name, sae in good.items():
        if name in FORMATS:
            save_sae_as(sae, tmp_path / name, format=FORMATS[name])
            sae = load_sae(tmp_path / name)
        diagnosis = diagnose(sae, bench.model, bench.config, hook_name=PLACES[GOOD[name][0]])  # type: ignore[arg-type]
        print(f"good {name}: {diagnosis.verdict}: {diagnosis.sentence}")
        if diagnosis.fits:
            passed.append(name)
    print(f"found {len(found)} of {len(faults)}, passed {len(passed)} of {len(good)}")
    assert len(found) >= 9, set(faults) - set(found)
    assert passed == list(good), set(good) - set(passed)
