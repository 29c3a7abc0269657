"""saelab convert: formats into each other, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commandline import saelab

from saelab.sae.base import SAE, Metadata
from saelab.sae.gated import GatedConfig
from saelab.sae.io import load_sae, new_sae, save_sae
from saelab.sae.jumprelu import JumpReLUConfig
from saelab.sae.topk import TopKConfig


def saved(path: Path, config) -> SAE:
    generator = torch.Generator().manual_seed(0)
    sae = new_sae(config, d_in=16, generator=generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.rand(parameter.shape, generator=generator)
    sae.metadata = Metadata(model_name="tiny", hook_name="blocks.1.hook_resid_post")
    save_sae(sae, path)
    return sae.requires_grad_(False)


def test_an_sae_goes_through_every_format_and_comes_back(tmp_path: Path):
    sae, acts = saved(tmp_path / "saelens", TopKConfig(d_sae=64, k=4)), torch.randn(20, 16)
    source = "saelens"
    for form in ("dictionary_learning", "sparsify", "saelens"):
        result = saelab("convert", tmp_path / source, tmp_path / f"to-{form}", "--format", form, "--json")
        assert result.code == 0, result.err
        told = json.loads(result.out)
        assert told["architecture"] == "topk"
        assert told["hook_name"] == "blocks.1.hook_resid_post"
        assert told["read_back"]["features_rms"] < 1e-6
        torch.testing.assert_close(load_sae(tmp_path / f"to-{form}")(acts), sae(acts))
        source = f"to-{form}"
    assert load_sae(tmp_path / "to-saelens").metadata == sae.metadata


def test_it_says_what_is_folded(tmp_path: Path):
    saved(tmp_path / "sae", JumpReLUConfig(d_sae=64))
    result = saelab("convert", tmp_path / "sae", tmp_path / "out", "--format", "gemma_scope")
    assert result.code == 0, result.err
    assert "b_dec, which the encoder of this format does not subtract, is folded into its bias" in result.out
    assert "the model, the hook and all other settings have no place in this format" in result.out
    assert "read back on 256 random inputs" in result.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sae", "out", "--format", "sparsify"], "cannot hold an SAE of architecture 'gated': it has topk, groupmax"),
        (["sae", "out", "--format", "gemma_scope"], "cannot hold an SAE of architecture 'gated'"),
        (["sae", "out", "--format", "sparsifi"], "there is no format 'sparsifi'; did you mean sparsify"),
        (["sae", "out", "--format", "openai"], "the format openai is read, not written"),
        (["sae", "out", "--from", "sparsify"], "holds an SAE of format saelens, not sparsify"),
        (["sae", "sae"], "already holds something; choose another OUT"),
        (["nothing", "out"], "there is no directory"),
        (["hf://../x", "out"], "names no place on the hub"),
    ],
)
def test_what_it_cannot_do_is_one_sentence_and_leaves_nothing(arguments, sentence, tmp_path: Path, monkeypatch):
    saved(tmp_path / "sae", GatedConfig(d_sae=64))
    monkeypatch.chdir(tmp_path)
    result = saelab("convert", *arguments)
    assert result.code == 2
    assert sentence in result.err
    assert len(result.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_a_file_that_computes_something_else_is_not_left_behind(tmp_path: Path, monkeypatch):
    saved(tmp_path / "sae", JumpReLUConfig(d_sae=64))
    monkeypatch.setattr(
        "saelab.sae.formats.weights.recentred", lambda weights: weights
    )  # a writer that forgets to fold
    result = saelab("convert", tmp_path / "sae", tmp_path / "out", "--format", "gemma_scope")
    assert result.code == 2
    assert "what comes back computes something else" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]
