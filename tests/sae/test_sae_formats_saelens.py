"""The native layout: every architecture comes back, older files are read, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from format_samples import CONFIGS, D_IN, D_SAE, METADATA, TURNED, K, assert_same, four, make, write_saelens
from safetensors.torch import load_file, save_file

from saelab.errors import ArtifactError
from saelab.sae.architectures import new_sae
from saelab.sae.base import Metadata, Source
from saelab.sae.io import load_sae, load_sae_files, read_sae, save_sae
from saelab.sae.topk import TopKConfig
from saelab.sae.transcoder import TranscoderConfig

V6 = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "metadata": {"sae_lens_version": "6.54.12"}}
V5 = {
    "d_in": D_IN,
    "d_sae": D_SAE,
    "dtype": "torch.float32",
    "model_name": "gpt2",
    "hook_point": "blocks.3.hook_resid_pre",
}
ACTS = torch.randn(30, D_IN, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_comes_back(name, tmp_path: Path):
    sae = make(name)
    save_sae(sae, tmp_path)
    loaded = load_sae_files(tmp_path)
    assert loaded.cfg.arch == TURNED.get(name, CONFIGS[name].arch)
    if name not in TURNED:
        assert loaded.cfg == CONFIGS[name]
        assert loaded.metadata == METADATA
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert_same(sae, loaded, exactly=True)

    save_sae(loaded, tmp_path / "again")
    assert (
        load_file(tmp_path / "sae_weights.safetensors").keys()
        == load_file(tmp_path / "again" / "sae_weights.safetensors").keys()
    )
    assert_same(loaded, load_sae(tmp_path / "again"), exactly=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_another_architecture_in_the_settings_is_refused(name, tmp_path: Path):
    save_sae(make(name), tmp_path)
    header = json.loads((tmp_path / "cfg.json").read_text())
    kinds = {"standard", "topk", "gated", "jumprelu", "matching_pursuit", "jumprelu_skip_transcoder", "crosscoder"}
    for other in kinds - {header["architecture"]}:
        changed = header | {"architecture": other, "d_out": D_IN, "n_slots": 2, "k": K}
        (tmp_path / "cfg.json").write_text(json.dumps(changed))
        with pytest.raises(ArtifactError, match=r"different SAEs|are these of architecture|its entry of saelab says"):
            load_sae_files(tmp_path)


def test_hints_name_the_architectures_that_have_the_tensors(tmp_path: Path):
    write_saelens(tmp_path, V6 | {"architecture": "gated"}, four() | {"threshold": torch.ones(D_SAE)})
    with pytest.raises(
        ArtifactError, match=r"lacks b_gate, b_mag, r_mag, which .*'gated' needs; are these of .*'jumprelu'"
    ):
        load_sae(tmp_path)


def test_a_legacy_file_is_read_as_its_version_meant_it(tmp_path: Path):
    tensors = four()
    settings = V5 | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "context_size": 128}
    read = read_sae(write_saelens(tmp_path, settings, tensors))
    top = ((ACTS - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).topk(K)
    feature_acts = torch.zeros(30, D_SAE).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(read.sae.encode(ACTS), feature_acts)
    torch.testing.assert_close(read.sae(ACTS), feature_acts @ tensors["W_dec"] + tensors["b_dec"])
    assert read.sae.metadata.hook_name == "blocks.3.hook_resid_pre"
    assert read.sae.metadata.model_name == "gpt2"
    assert read.sae.metadata.context_size == 128
    assert read.folded == ("the settings are those of SAELens before 6 and are read as version 6",)


@pytest.mark.parametrize("version", [{}, {"sae_lens_version": "5.11.0"}, {"sae_lens_version": "3.0"}])
def test_a_legacy_file_without_anything_is_a_relu_sae(version, tmp_path: Path):
    tensors = four()
    sae = load_sae(write_saelens(tmp_path, V5 | version, tensors))
    expected = ((ACTS - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    torch.testing.assert_close(sae.encode(ACTS), expected)
    assert sae.cfg.arch == "relu"


def test_a_legacy_scaling_factor_of_ones_is_dropped_and_another_is_folded(tmp_path: Path):
    tensors, factor = four(), torch.rand(D_SAE) + 0.5
    plain = load_sae(write_saelens(tmp_path / "plain", V5, tensors))
    ones = load_sae(write_saelens(tmp_path / "ones", V5, tensors | {"scaling_factor": torch.ones(D_SAE)}))
    assert_same(plain, ones, exactly=True)
    path = write_saelens(tmp_path / "tuned", V5, tensors | {"scaling_factor": factor})
    with pytest.raises(ArtifactError, match="scaling_factor other than 1, but finetuning_scaling_factor is not set"):
        load_sae(path)
    write_saelens(path, V5 | {"finetuning_scaling_factor": True}, tensors | {"scaling_factor": factor})
    feature_acts = plain.encode(ACTS)
    torch.testing.assert_close(load_sae(path).encode(ACTS), feature_acts)
    recon = (feature_acts * factor) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(load_sae(path)(ACTS), recon, rtol=1e-5, atol=1e-5)


def test_a_threshold_in_log_space_is_read(tmp_path: Path):
    tensors, threshold = four(), torch.rand(D_SAE) + 0.1
    logs = write_saelens(
        tmp_path / "logs", V5 | {"architecture": "jumprelu"}, tensors | {"log_threshold": threshold.log()}
    )
    plain = write_saelens(tmp_path / "plain", V6 | {"architecture": "jumprelu"}, tensors | {"threshold": threshold})
    assert_same(load_sae(plain), load_sae(logs))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"activation_fn": "tanh-relu"}, "activation function 'tanh-relu', which is not read"),
        ({"activation_fn": "topk"}, "k must be of type int, got None"),
        ({"activation_fn": "topk", "activation_fn_kwargs": 5}, "activation_fn_kwargs = 5, but it must be a table"),
        ({"activation_fn": "topk", "architecture": "gated"}, "architecture 'gated', yet keeps the k largest"),
        ({"architecture": "topk"}, "architecture 'topk', but gives no k"),
        ({"normalize_activations": True}, "normalises its input by 'expected_average_only_in'"),
        ({"normalize_activations": "layer_norm"}, "normalises its input by 'layer_norm'"),
        ({"metadata": {"hook_name": "x"}}, "yet has the table of metadata of version 6"),
        ({"hook_point": 5}, "hook_name = 5, but it must be text"),
    ],
)
def test_legacy_settings_that_are_not_read_are_named(settings, sentence, tmp_path: Path):
    write_saelens(tmp_path, V5 | settings, four())
    with pytest.raises(ArtifactError, match=sentence):
        load_sae(tmp_path)


@pytest.mark.parametrize("rescaled", [False, True])
def test_a_training_checkpoint_is_read_as_what_it_is_at_inference(rescaled, tmp_path: Path):
    tensors = four()
    settings = V6 | {"architecture": "batchtopk", "k": 5.0, "rescale_acts_by_decoder_norm": rescaled}
    write_saelens(tmp_path, settings, tensors | {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)})
    sae, norms = load_sae(tmp_path), tensors["W_dec"].norm(dim=1)
    pre_acts = (ACTS - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    pre_acts = pre_acts * norms if rescaled else pre_acts
    torch.testing.assert_close(sae.encode(ACTS), pre_acts.relu() * (pre_acts > 0.7), rtol=1e-5, atol=1e-5)
    assert sae.cfg.arch == "jumprelu"
    assert sae.dtype == torch.float32
    assert sae.metadata.extra["training_architecture"] == "batchtopk"


@pytest.mark.parametrize("rescaled", [False, True])
def test_the_input_scale_beside_a_training_checkpoint_is_folded(rescaled, tmp_path: Path):
    tensors = four() | {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)}
    settings = V6 | {"architecture": "batchtopk", "rescale_acts_by_decoder_norm": rescaled}
    plain = load_sae(write_saelens(tmp_path / "plain", settings, tensors))
    write_saelens(tmp_path, settings | {"normalize_activations": "expected_average_only_in"}, tensors)
    with pytest.raises(ArtifactError, match="normalises its input by 'expected_average_only_in'"):
        load_sae_files(tmp_path)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.25}))
    scaled = load_sae_files(tmp_path)
    unit = 4.0 if rescaled else 1.0  # rescaled activations are in units of the reconstruction
    torch.testing.assert_close(scaled.encode(ACTS / 0.25), plain.encode(ACTS) * unit, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaled(ACTS / 0.25), plain(ACTS) / 0.25, rtol=1e-5, atol=1e-5)
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": -1}))
    with pytest.raises(ArtifactError, match="scaling_factor = -1, but it must be a positive number"):
        load_sae_files(tmp_path)


def test_thresholds_are_strict_and_stay_so_when_b_dec_is_folded(tmp_path: Path):
    exact = {  # small dyadic numbers, so that no sum rounds and a pre-activation can equal its threshold
        "W_enc": torch.randint(-4, 5, (D_IN, D_SAE)) / 4,
        "b_enc": torch.randint(-4, 5, (D_SAE,)) / 4,
        "W_dec": torch.randint(-4, 5, (D_SAE, D_IN)) / 4,
        "b_dec": torch.randint(-4, 5, (D_IN,)) / 4,
        "threshold": torch.randint(1, 5, (D_SAE,)) / 16,
    }
    settings = V6 | {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    sae, acts = load_sae(write_saelens(tmp_path, settings, exact)), torch.randint(-4, 5, (2000, D_IN)) / 4
    pre_acts = acts @ exact["W_enc"] + exact["b_enc"]
    assert (pre_acts == exact["threshold"]).sum() > 100
    assert torch.equal(sae.encode(acts), pre_acts.relu() * (pre_acts > exact["threshold"]))
    assert torch.equal(sae(acts), sae.encode(acts) @ exact["W_dec"] + exact["b_dec"])


def test_an_option_that_an_architecture_does_not_have_means_nothing(tmp_path: Path):
    settings = V6 | {"architecture": "standard", "rescale_acts_by_decoder_norm": "whatever", "k": "x", "mystery": []}
    tensors = four()
    sae = load_sae(write_saelens(tmp_path, settings, tensors))
    torch.testing.assert_close(sae(ACTS), sae.encode(ACTS) @ tensors["W_dec"] + tensors["b_dec"])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"architecture": "transcoder"}, "d_out = None, but it must be a whole number"),
        ({"architecture": "transcoder", "d_out": 5}, r"W_dec of shape \[40, 9\], but .* says \[40, 5\]"),
        ({"architecture": "transcoder", "d_out": D_IN, "apply_b_dec_to_input": True}, "subtracts b_dec from the input"),
        ({"architecture": "topk", "k": K, "apply_b_dec_to_input": "no"}, "must be true or false"),
        ({"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": 1}, "must be true or false"),
        ({"architecture": ["topk"]}, "which this version does not read"),
        ({"architecture": "standard", "normalize_activations": "layer_norm"}, "no weights can do that, and a decoder"),
        ({"architecture": "standard", "normalize_activations": "covariance_whitening"}, "fold it into the weights"),
        ({"architecture": "temporal"}, "which this version does not read"),
        ({"architecture": "groupmax", "k": 7}, "k must divide d_sae=40"),
        ({"architecture": "standard", "metadata": {"sae_lens_version": "6.0.0", "hook_name": []}}, "must be text"),
        ({"architecture": "standard", "metadata": {"sae_lens_version": "6.0.0", "context_size": -1}}, "whole number"),
        ({"architecture": "standard", "metadata": {"sae_lens_version": "6.0.0", "saelab": 3}}, "must be a table"),
    ],
)
def test_settings_that_contradict_are_refused(settings, sentence, tmp_path: Path):
    write_saelens(tmp_path, V6 | settings, four())
    with pytest.raises(ArtifactError, match=sentence):
        load_sae(tmp_path)


def test_matching_pursuit_that_does_not_subtract_b_dec_does_not_add_it(tmp_path: Path):
    tensors = {name: four()[name] for name in ("W_dec", "b_dec")}
    settings = V6 | {"architecture": "matching_pursuit", "apply_b_dec_to_input": False, "max_iterations": 3}
    sae = load_sae(write_saelens(tmp_path, settings, tensors))
    assert not sae.b_dec.any()
    assert sae.cfg.max_iterations == 3
    torch.testing.assert_close(sae(ACTS), sae.encode(ACTS) @ tensors["W_dec"])


def test_weights_of_half_precision_are_checked_and_read(tmp_path: Path):
    tensors = {name: tensor.half() for name, tensor in four().items()}
    assert load_sae(write_saelens(tmp_path, V6 | {"architecture": "standard"}, tensors)).dtype == torch.float32
    tensors["b_dec"][0] = float("inf")
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ArtifactError, match="b_dec that is not finite"):
        load_sae(tmp_path)


def test_all_sources_and_what_is_read_of_them_come_back(tmp_path):
    sources = (Source(model_name="base", hook_name="a"), Source(model_name="tuned", model_sha256="12", hook_name="b"))
    transcoder = new_sae(TranscoderConfig(d_sae=8, k=2), d_in=4)
    difference = new_sae(TopKConfig(d_sae=8, k=2), d_in=4)
    for name, sae, reads in (("t", transcoder, "activations"), ("d", difference, "difference")):
        sae.metadata = Metadata(model_name="base", hook_name="a", sources=sources, reads=reads)
        save_sae(sae, tmp_path / name)
        loaded = load_sae_files(tmp_path / name).metadata
        assert (loaded.sources, loaded.reads) == (sources, reads)
    told = json.loads((tmp_path / "t" / "cfg.json").read_text())["metadata"]
    assert told["hook_name_out"] == "b"
    del told["saelab"]["sources"]  # as a file of SAELens has it
    content = json.loads((tmp_path / "t" / "cfg.json").read_text())
    content["metadata"] = told
    (tmp_path / "t" / "cfg.json").write_text(json.dumps(content))
    assert [source.hook_name for source in load_sae_files(tmp_path / "t").metadata.sources] == ["a", "b"]
