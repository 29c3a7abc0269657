"""The demo model: converted whole, faithful, and fluent; made once, whatever interrupts it."""

from __future__ import annotations

import json

import pytest
import torch

from saelab import atomic
from saelab.errors import AssetError
from saelab.models import demo
from saelab.models.load import check_fidelity, load_model
from saelab.models.tiny import tiny_tokenizer


@pytest.fixture
def fake_conversion(tmp_path, monkeypatch):
    """An empty cache and a conversion that writes two small files."""
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path))
    calls = []

    def convert(path, progress):
        calls.append(path)
        progress("converting")
        (path / "model.safetensors").write_bytes(b"weights")
        atomic.write_json(path / demo.MANIFEST, {"weights_bytes": 7})

    monkeypatch.setattr(demo, "_convert", convert)
    return calls


def test_the_demo_model_is_made_once(fake_conversion):
    told = []
    assert demo.demo_model_dir(progress=told.append) == demo.demo_model_dir()
    assert (len(fake_conversion), told) == (1, ["converting"])
    assert demo.is_cached()


def test_an_interrupted_conversion_is_swept_and_made_again(fake_conversion, tmp_path):
    leftover = tmp_path / "models" / f"{demo.NAMES[-1]}.part-1-abc"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    path = demo.demo_model_dir()
    assert not leftover.exists()
    assert (path / "model.safetensors").read_bytes() == b"weights"


def test_a_truncated_model_is_made_again(fake_conversion):
    path = demo.demo_model_dir()
    (path / "model.safetensors").write_bytes(b"wei")
    assert not demo.is_cached()
    assert (demo.demo_model_dir() / "model.safetensors").read_bytes() == b"weights"


def test_a_failed_conversion_leaves_nothing(fake_conversion, tmp_path, monkeypatch):
    def fail(path, progress):
        (path / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model_dir()
    assert [p.name for p in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_model_that_does_not_know_paris_is_refused(tiny_model):
    with pytest.raises(AssetError, match="came out of its conversion damaged"):
        demo.check_conversion(tiny_model.bridge.original_model, tiny_model.tokenizer)


def test_digits_are_split_from_the_space_before_them():
    tokenizer = tiny_tokenizer()
    joined = "1 \n2"
    plain = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(joined)
    demo.restore_digit_splitting(tokenizer)
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(joined)
    assert [piece for piece, _ in split] == ["1", "ĠĊ", "2"] != [piece for piece, _ in plain]


@pytest.mark.demo
def test_the_demo_model_is_what_its_manifest_says(demo_model):
    folder = demo.demo_model_dir()
    manifest = json.loads((folder / demo.MANIFEST).read_text())
    assert "dequantised from GGUF Q4_1" in manifest["precision"]
    assert manifest["license"] == "Apache-2.0"
    assert manifest["weights_sha256"] == atomic.sha256(folder / "model.safetensors")
    assert not (folder / "gguf").exists()
    assert demo_model.path_or_id == str(folder)
    assert (demo_model.d_model, demo_model.n_layers, demo_model.d_vocab) == (576, 30, 49_152)
    assert (demo_model.dtype, demo_model.bos_id) == (torch.bfloat16, 1)


@pytest.mark.demo
def test_the_demo_model_is_faithful(demo_model):
    assert check_fidelity(demo_model) == 0.0
    assert load_model("smollm2-135m-instruct", device="cpu").weights_sha256 == demo_model.weights_sha256


@pytest.mark.demo
def test_the_demo_model_writes_sense_and_is_steered_without_a_trace(demo_model):
    assert demo_model.generate("The capital of France is", max_new_tokens=2).strip(" .") == "Paris"
    answer = demo_model.generate(demo_model.chat([{"role": "user", "content": "What is 2+2?"}]), max_new_tokens=12)
    assert "4" in answer
    ids = demo_model.to_tokens("The tower was").ids
    before = demo_model.logits(ids)
    with demo_model.edit("blocks.10.hook_resid_post", lambda acts, keep: acts + 3):
        assert not torch.equal(demo_model.logits(ids), before)
    assert torch.equal(demo_model.logits(ids), before)
    assert demo_model.active_hooks() == []


@pytest.mark.demo
def test_the_demo_tokenizer_splits_digits_and_loses_nothing(demo_model):
    text = "In 1984,\n 5 naïve cafés — 漢字 🙂"
    ids = demo_model.to_tokens(text).ids[0]
    pieces = demo_model.str_tokens(ids)
    assert pieces[3:7] == ["1", "9", "8", "4"]
    assert b"".join(demo_model._token_bytes[int(i)] for i in ids[1:]).decode() == text
