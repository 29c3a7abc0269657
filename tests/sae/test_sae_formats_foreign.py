"""The formats of other tools: what we write comes back, and files built from their documented layout are read right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_samples import CONFIGS, D_IN, D_SAE, METADATA, K, assert_same, four, make, write_npz
from safetensors.torch import load_file, save_file

from saelab.errors import ArtifactError, ConfigError
from saelab.sae.formats.detect import FORMATS
from saelab.sae.io import load_sae, read_sae, save_sae, save_sae_as

ACTS = torch.randn(30, D_IN, generator=torch.Generator().manual_seed(7))
#: What each format can hold, and what comes back where that is another architecture.
HELD: dict[str, dict[str, str]] = {
    "dictionary_learning": dict.fromkeys(("relu", "gated", "topk", "jumprelu", "batchtopk", "matryoshka"), "")
    | {"panneal": "relu", "relu-seed": ""},
    "sparsify": dict.fromkeys(("topk", "groupmax", "transcoder-topk", "transcoder-topk-skip"), ""),
    "gemma_scope": dict.fromkeys(("jumprelu", "batchtopk", "matryoshka", "relu", "relu-seed", "panneal"), "jumprelu"),
}
PAIRS = [(form, name) for form in HELD for name in CONFIGS]


@pytest.mark.parametrize(("form", "name"), PAIRS)
def test_a_format_holds_an_sae_or_says_that_it_cannot(form, name, tmp_path: Path):
    sae = make(name)
    if name not in HELD[form]:
        with pytest.raises(
            ArtifactError, match=rf"the format {form} cannot hold an SAE of architecture .*; convert it to"
        ):
            save_sae_as(sae, tmp_path, format=form)
        return
    save_sae_as(sae, tmp_path, format=form)
    loaded = load_sae(tmp_path)
    assert loaded.cfg.arch == (HELD[form][name] or CONFIGS[name].arch)
    assert_same(sae, loaded)
    if form != "gemma_scope":
        assert loaded.metadata == METADATA
        assert loaded.cfg == (CONFIGS[name] if not HELD[form][name] else loaded.cfg)
    save_sae_as(loaded, tmp_path / "again", format=form)
    assert_same(loaded, load_sae(tmp_path / "again"))


@pytest.mark.parametrize("form", HELD)
def test_a_written_file_names_all_its_hidden_changes(form, tmp_path: Path):
    notes = save_sae_as(make("jumprelu" if form != "sparsify" else "topk"), tmp_path, format=form)
    assert any("folded into its bias" in note for note in notes) == (form != "sparsify")


def test_settings_say_which_weights_they_were_written_for(tmp_path: Path):
    for form in ("dictionary_learning", "sparsify"):
        for name, seed in (("a", 1), ("b", 2)):
            torch.manual_seed(seed)
            sae = make("topk")
            with torch.no_grad():
                sae.b_enc += torch.randn(D_SAE)
            save_sae_as(sae, tmp_path / form / name, format=form)
        weights = FORMATS[form].files[0]
        (tmp_path / form / "b" / weights).replace(tmp_path / form / "a" / weights)
        with pytest.raises(ArtifactError, match="its checksum differs"):
            load_sae(tmp_path / form / "a")


def test_formats_are_told_apart_and_named(tmp_path: Path):
    sae = make("topk", unit_decoder=True)
    for form in ("saelens", "dictionary_learning", "sparsify"):
        save_sae_as(sae, tmp_path / form, format=form)
        assert_same(sae, load_sae(tmp_path / form, format=form))
        assert_same(sae, load_sae(tmp_path / form / FORMATS[form].files[0]))
        other = "sparsify" if form != "sparsify" else "saelens"
        with pytest.raises(ArtifactError, match=f"holds an SAE of format {form}, not {other}"):
            load_sae(tmp_path / form, format=other)
    with pytest.raises(ConfigError, match="there is no format 'sae_lens'; did you mean saelens"):
        load_sae(tmp_path / "saelens", format="sae_lens")
    (tmp_path / "saelens" / "ae.pt").write_bytes((tmp_path / "dictionary_learning" / "ae.pt").read_bytes())
    with pytest.raises(ArtifactError, match=r"files of several formats \(saelens, dictionary_learning\); name the one"):
        load_sae(tmp_path / "saelens")
    assert_same(sae, load_sae(tmp_path / "saelens", format="saelens"), exactly=True)
    (tmp_path / "notes.txt").write_text("no weights")
    with pytest.raises(ArtifactError, match="no SAE of a known format; the formats are saelens, sparsify"):
        load_sae(tmp_path / "notes.txt")


def test_what_is_only_read_is_not_written(tmp_path: Path):
    for form in ("llama_scope", "openai"):
        with pytest.raises(ConfigError, match=f"the format {form} is read, not written; write one of saelens"):
            save_sae_as(make("relu"), tmp_path / form, format=form)
        assert not (tmp_path / form).exists()
    with pytest.raises(ConfigError, match="there is no format 'gemma'; did you mean gemma_scope"):
        save_sae_as(make("relu"), tmp_path, format="gemma")


def dictionary_learning(path: Path, tensors: dict[str, Any], **trainer: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path / "ae.pt")
    place = {"layer": 3, "lm_name": "tiny", "submodule_name": "resid_post_layer_3"}
    (path / "config.json").write_text(json.dumps({"trainer": trainer | place, "buffer": {"ctx_len": 128}}))
    return path


def linear(**more: Any) -> dict[str, Any]:
    """Two linear layers as dictionary_learning names them, for the classes that keep k."""
    four_ = four()
    named = {"encoder.weight": four_["W_enc"].T, "encoder.bias": four_["b_enc"], "decoder.weight": four_["W_dec"].T}
    return {name: tensor.contiguous() for name, tensor in named.items()} | {"b_dec": four_["b_dec"]} | more


def with_k(threshold: float = -1.0, k: int = K) -> dict[str, Any]:
    return linear(k=torch.tensor(k, dtype=torch.int32), threshold=torch.tensor(threshold))


def test_a_dictionary_learning_autoencoder_gets_the_unit_decoder_that_its_loader_gives_it(tmp_path: Path):
    tensors = linear()
    tensors["bias"] = tensors.pop("b_dec")
    read = read_sae(dictionary_learning(tmp_path, tensors, dict_class="AutoEncoder"))
    raw = ((ACTS - tensors["bias"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
    torch.testing.assert_close(read.sae.encode(ACTS), raw * tensors["decoder.weight"].norm(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        read.sae(ACTS), raw @ tensors["decoder.weight"].T + tensors["bias"], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(read.sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert read.folded == ("the norms of the decoder's rows are folded into the encoder, as load_dictionary does",)
    assert read.sae.metadata.hook_name == "blocks.3.hook_resid_post"
    assert read.sae.metadata.context_size == 128


def test_a_dictionary_learning_threshold_that_was_never_set_lets_everything_positive_pass(tmp_path: Path):
    tensors = with_k(-1.0)
    read = read_sae(dictionary_learning(tmp_path, tensors, dict_class="BatchTopKSAE", k=K))
    pre_acts = (ACTS - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    torch.testing.assert_close(read.sae.encode(ACTS), pre_acts.relu())
    assert "never set" in read.folded[0]


def test_dictionary_learning_needs_settings_only_where_tensors_leave_two_classes(tmp_path: Path):
    gated = four()
    tensors = {
        "decoder_bias": gated["b_dec"],
        "encoder.weight": gated["W_enc"].T.contiguous(),
        "decoder.weight": gated["W_dec"].T.contiguous(),
        "r_mag": torch.zeros(D_SAE),
        "gate_bias": gated["b_enc"],
        "mag_bias": gated["b_enc"],
    }
    torch.save(tensors, tmp_path / "ae.pt")
    assert load_sae(tmp_path).cfg.arch == "gated"
    torch.save(with_k(), tmp_path / "ae.pt")
    with pytest.raises(ArtifactError, match="may be of the class AutoEncoderTopK or BatchTopKSAE; put its config"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "trainer", "sentence"),
    [
        (with_k(), {"dict_class": "GatedAutoEncoder"}, "are those of AutoEncoderTopK or BatchTopKSAE; the two files"),
        (with_k(), {"dict_class": "BatchTopK"}, "dict_class 'BatchTopK', which is not read; did you mean BatchTopKSAE"),
        (with_k(), {"dict_class": "BatchTopKSAE", "k": 7}, "has k = 7, but ae.pt holds k = 5"),
        (with_k(k=41), {"dict_class": "BatchTopKSAE"}, "k must be between 1 and d_sae=40, got 41"),
        (with_k(), {"dict_class": "BatchTopKSAE", "dict_size": 41}, "dict_size = 41, but encoder.weight"),
        (with_k(), {"dict_class": "BatchTopKSAE", "activation_dim": 8}, "activation_dim = 8, but encoder.weight"),
        (with_k(math.nan), {"dict_class": "BatchTopKSAE"}, "a value in threshold that is not finite"),
        (linear(k=5, threshold=0.5), {"dict_class": "BatchTopKSAE"}, "k = 5, but it must be one whole number"),
        (linear(), {"dict_class": "BatchTopKSAE"}, "lacks k, threshold, which the class BatchTopKSAE needs"),
        (with_k() | {"b_dec": torch.ones(8)}, {"dict_class": "BatchTopKSAE"}, r"b_dec of shape \[8\]"),
        (with_k() | {"extra": torch.ones(8)}, {"dict_class": "BatchTopKSAE"}, "holds extra, which the class"),
        ({"encoder.weight": 3}, {"dict_class": "AutoEncoder"}, "lacks bias, decoder.weight"),
    ],
)
def test_dictionary_learning_files_that_contradict_are_refused(tensors, trainer, sentence, tmp_path: Path):
    dictionary_learning(tmp_path, tensors, **trainer)
    with pytest.raises(ArtifactError, match=sentence):
        load_sae(tmp_path)


@pytest.mark.parametrize("sizes", [[40], [10, 30], [1] * 40])
def test_matryoshka_groups_come_through(sizes, tmp_path: Path):
    tensors = four() | {"k": torch.tensor(K), "threshold": torch.tensor(0.5), "group_sizes": torch.tensor(sizes)}
    sae = load_sae(dictionary_learning(tmp_path, tensors, dict_class="MatryoshkaBatchTopKSAE"))
    assert torch.tensor([0, *sae.cfg.group_ends]).diff().tolist() == sizes
    torch.save(tensors | {"group_sizes": torch.tensor([*sizes, 1])}, tmp_path / "ae.pt")
    with pytest.raises(ArtifactError, match="must be positive and add up to 40"):
        load_sae(tmp_path)


SPARSIFY = {"activation": "topk", "expansion_factor": 32, "num_latents": D_SAE, "k": K, "d_in": D_IN}


def sparsify(path: Path, **settings: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tensors = {n: t for n, t in linear().items() if n != "decoder.weight"} | {"W_dec": four()["W_dec"]}
    if settings.pop("W_skip", settings.get("skip_connection", False)):
        tensors["W_skip"] = torch.randn(D_IN, D_IN)
    save_file(tensors, path / "sae.safetensors")
    (path / "cfg.json").write_text(json.dumps(SPARSIFY | settings))
    return path


def test_a_signed_sparsify_sae_keeps_the_k_largest_magnitudes(tmp_path: Path):
    sae, tensors = load_sae(sparsify(tmp_path / "layers.5", signed=True)), four()
    pre_acts = (ACTS - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    kept = pre_acts.abs() >= pre_acts.abs().topk(K).values[:, -1:]
    torch.testing.assert_close(sae.encode(ACTS), pre_acts * kept, rtol=1e-5, atol=1e-5)
    assert sae.metadata.hook_name == "blocks.5.hook_resid_post"


@pytest.mark.parametrize("transcode", [False, True])
def test_a_sparsify_skip_reads_the_input_itself_and_only_a_transcoder_encodes_it_uncentred(transcode, tmp_path: Path):
    path = sparsify(tmp_path, skip_connection=True, transcode=transcode)
    sae, tensors, W_skip = load_sae(path), four(), load_file(path / "sae.safetensors")["W_skip"]
    centred = ACTS if transcode else ACTS - tensors["b_dec"]
    top = (centred @ tensors["W_enc"] + tensors["b_enc"]).relu().topk(K)
    feature_acts = torch.zeros(30, D_SAE).scatter(1, top.indices, top.values)
    torch.testing.assert_close(sae.encode(ACTS), feature_acts, rtol=1e-5, atol=1e-5)
    recon = feature_acts @ tensors["W_dec"] + tensors["b_dec"] + ACTS @ W_skip.T
    torch.testing.assert_close(sae(ACTS), recon, rtol=1e-5, atol=1e-5)


def test_the_folder_of_a_sparsify_sae_tells_its_hook(tmp_path: Path):
    names = {"layers.5.mlp": "blocks.5.hook_mlp_out", "h.3": "blocks.3.hook_resid_post", "embed": "", "layers.x": ""}
    for folder, hook in names.items():
        assert load_sae(sparsify(tmp_path / folder)).metadata.hook_name == hook


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"k": 41}, "k must be between 1 and d_sae=40"),
        ({"k": "5"}, "k = '5', but it must be like 32"),
        ({"activation": "relu"}, "activation 'relu', which is not read"),
        ({"activation": "groupmax", "k": 7}, "k must divide d_sae=40"),
        ({"activation": "groupmax", "transcode": True}, "is a groupmax transcoder, which is not read"),
        ({"signed": True, "transcode": True}, "is a signed transcoder"),
        ({"signed": True, "activation": "groupmax"}, "both signed and of groups"),
        ({"num_latents": 0}, r"of shape \[40, 9\], but cfg.json \(d_in=9, 288 latents\) says \[288, 9\]"),
        ({"num_latents": D_IN, "d_in": D_SAE}, "whose transpose this is"),
        ({"num_latents": -1}, "must be positive"),
        ({"d_in": None}, "d_in = None"),
        ({"skip_connection": True, "W_skip": False}, "lacks W_skip, which a skip transcoder of sparsify needs"),
        ({"W_skip": True}, "holds W_skip, which an SAE of sparsify does not have"),
    ],
)
def test_sparsify_files_that_contradict_are_refused(settings, sentence, tmp_path: Path):
    sparsify(tmp_path, **settings)
    with pytest.raises(ArtifactError, match=sentence):
        load_sae(tmp_path)


@pytest.mark.parametrize("spelling", ["W_enc", "w_enc"])
def test_gemma_scope_reads_the_input_uncentred(spelling, tmp_path: Path):
    tensors = four() | {"threshold": torch.rand(D_SAE)}
    named = {name.replace("W_", spelling[:2]): tensor for name, tensor in tensors.items()}
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    sae = load_sae(write_npz(folder, named))
    pre_acts = ACTS @ tensors["W_enc"] + tensors["b_enc"]
    feature_acts = pre_acts.relu() * (pre_acts > tensors["threshold"])
    torch.testing.assert_close(sae.encode(ACTS), feature_acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(ACTS), feature_acts @ tensors["W_dec"] + tensors["b_dec"], rtol=1e-5, atol=1e-5)
    assert (sae.metadata.model_name, sae.metadata.hook_name) == ("google/gemma-2-2b", "blocks.20.hook_resid_post")
    assert_same(sae, load_sae(folder / "params.npz"), exactly=True)


def test_the_embedding_sae_of_gemma_scope_has_the_scale_of_the_embedding(tmp_path: Path):
    tensors = four() | {"threshold": torch.rand(D_SAE)}
    plain = load_sae(write_npz(tmp_path / "gemma-scope-2b-pt-res" / "layer_0" / "width_4k", tensors))
    embedding = load_sae(write_npz(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k", tensors))
    root = math.sqrt(D_IN)
    pre_acts = ACTS @ tensors["W_enc"] / root + tensors["b_enc"]
    feature_acts = pre_acts.relu() * (pre_acts > tensors["threshold"])
    torch.testing.assert_close(embedding.encode(ACTS), feature_acts, rtol=1e-5, atol=1e-5)
    recon = root * (feature_acts @ tensors["W_dec"]) + tensors["b_dec"]
    torch.testing.assert_close(embedding(ACTS), recon, rtol=1e-5, atol=1e-5)
    assert embedding.metadata.hook_name == "hook_embed"
    assert plain.metadata.hook_name == "blocks.0.hook_resid_post"


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2_is_read_with_its_transcoders(skip, tmp_path: Path):
    tensors = {name.lower(): tensor for name, tensor in four().items()} | {"threshold": torch.rand(D_SAE)}
    affine = torch.randn(D_IN, D_IN)
    folder = tmp_path / "transcoder" / "layer_9_width_16k_l0_small"
    folder.mkdir(parents=True)
    save_file(tensors | ({"affine_skip_connection": affine} if skip else {}), folder / "params.safetensors")
    settings = {"architecture": "jump_relu", "affine_connection": skip, "model_name": "google/gemma-3-1b-pt"}
    (folder / "config.json").write_text(json.dumps(settings | {"hf_hook_point_in": "a", "hf_hook_point_out": "b"}))
    sae = load_sae(folder)
    pre_acts = ACTS @ tensors["w_enc"] + tensors["b_enc"]
    feature_acts = pre_acts.relu() * (pre_acts > tensors["threshold"])
    recon = feature_acts @ tensors["w_dec"] + tensors["b_dec"] + (ACTS @ affine if skip else 0)
    torch.testing.assert_close(sae(ACTS), recon, rtol=1e-5, atol=1e-5)
    assert sae.cfg.arch == "transcoder"
    assert sae.cfg.skip == skip
    (folder / "config.json").write_text(json.dumps(settings | {"affine_connection": not skip}))
    with pytest.raises(ArtifactError, match="the two files belong to different SAEs"):
        load_sae(folder)
    (folder / "config.json").write_text(json.dumps({"architecture": "topk"}))
    with pytest.raises(ArtifactError, match="architecture 'topk', which is not read"):
        load_sae(folder)


def test_gemma_scope_2_without_settings_is_an_autoencoder(tmp_path: Path):
    tensors = {name.lower(): tensor for name, tensor in four().items()} | {"threshold": torch.rand(D_SAE)}
    folder = tmp_path / "resid_post" / "layer_9_width_16k_l0_small"
    folder.mkdir(parents=True)
    save_file(tensors, folder / "params.safetensors")
    sae = load_sae(folder)
    assert sae.cfg.arch == "jumprelu"
    assert sae.metadata.hook_name == "blocks.9.hook_resid_post"


HYPERPARAMS = {
    "d_model": D_IN,
    "d_sae": D_SAE,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.2,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 6.0, "out": 6.0},
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "hook_point_in": "blocks.8.hook_resid_post",
    "hook_point_out": "blocks.8.hook_resid_post",
    "top_k": 50,
}


def llama_scope(path: Path, **settings: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    tensors = linear()
    tensors["decoder.bias"] = tensors.pop("b_dec")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, path / "checkpoints" / "final.safetensors")
    (path / "hyperparams.json").write_text(json.dumps(HYPERPARAMS | settings))
    return path, {name: tensor.float() for name, tensor in tensors.items()}


def llama_scope_by_hand(tensors: dict[str, torch.Tensor], scale: float, scale_out: float, theta: float):
    """On activations scaled to norm sqrt(d), with a threshold that is in units of raw activations."""
    pre_acts = (ACTS * scale) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    feature_acts = pre_acts.relu() * (pre_acts > theta * scale)
    return feature_acts, (feature_acts @ tensors["decoder.weight"].T + tensors["decoder.bias"]) / scale_out


def test_llama_scope_scales_input_output_and_threshold(tmp_path: Path):
    path, tensors = llama_scope(tmp_path)
    sae, scale = load_sae(path), math.sqrt(D_IN) / 6
    feature_acts, recon = llama_scope_by_hand(tensors, scale, scale, 0.2)
    torch.testing.assert_close(sae.encode(ACTS), feature_acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(ACTS), recon, rtol=1e-5, atol=1e-5)
    assert sae.metadata.hook_name == "blocks.8.hook_resid_post"
    assert_same(sae, load_sae(path / "checkpoints" / "final.safetensors"), exactly=True)


def test_a_llama_scope_transcoder_has_a_scale_for_its_output(tmp_path: Path):
    norms = {"in": 6.0, "out": 2.0}
    path, tensors = llama_scope(tmp_path, dataset_average_activation_norm=norms, hook_point_out="blocks.8.hook_mlp_out")
    sae = load_sae(path)
    feature_acts, recon = llama_scope_by_hand(tensors, math.sqrt(D_IN) / 6, math.sqrt(D_IN) / 2, 0.2)
    assert sae.cfg.arch == "transcoder"
    torch.testing.assert_close(sae.encode(ACTS), feature_acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(ACTS), recon, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"act_fn": "topk"}, "act_fn = 'topk', which is not read"),
        ({"norm_activation": "token-wise"}, "norm_activation = 'token-wise', which is not read"),
        ({"jump_relu_threshold": -1}, "must be a positive number"),
        ({"dataset_average_activation_norm": {}}, "in = None, but it must be a positive number"),
        ({"dataset_average_activation_norm": 5}, "must be a table"),
        ({"d_sae": D_SAE + 1}, "belong to different SAEs"),
        ({"d_model": 0}, "d_model = 0"),
        ({"apply_decoder_bias_to_pre_encoder": True, "hook_point_out": "x"}, "which does not fit"),
        ({"hook_point_in": 7, "hook_point_out": 7}, "hook_name = 7, but it must be text"),
    ],
)
def test_llama_scope_settings_that_are_not_read_are_named(settings, sentence, tmp_path: Path):
    path, _ = llama_scope(tmp_path, **settings)
    with pytest.raises(ArtifactError, match=sentence):
        load_sae(path)


def openai_state(**more: Any) -> dict[str, Any]:
    tensors = linear()
    tensors["pre_bias"], tensors["latent_bias"] = tensors.pop("b_dec"), tensors.pop("encoder.bias")
    statistics = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
    return tensors | {name: torch.zeros(D_SAE, dtype=torch.long) for name in statistics} | more


def test_openais_relu_saes_are_read_and_those_that_normalise_tokens_refused(tmp_path: Path):
    folder = tmp_path / "resid_delta_mlp_v4" / "autoencoders"
    folder.mkdir(parents=True)
    tensors = openai_state(activation="ReLU", activation_state_dict={})
    torch.save(tensors, folder / "6.pt")
    sae = load_sae(folder / "6.pt")
    feature_acts = ((ACTS - tensors["pre_bias"]) @ tensors["encoder.weight"].T + tensors["latent_bias"]).relu()
    torch.testing.assert_close(sae.encode(ACTS), feature_acts)
    torch.testing.assert_close(sae(ACTS), feature_acts @ tensors["decoder.weight"].T + tensors["pre_bias"])
    assert (sae.metadata.model_name, sae.metadata.hook_name) == ("gpt2", "blocks.6.hook_mlp_out")

    torch.save(openai_state(), folder / "autoencoder.pt")
    assert_same(sae, load_sae(folder), exactly=True)
    state = {"k": 32, "postact_fn": "ReLU"}
    torch.save(openai_state(activation="TopK", activation_state_dict=state), folder / "autoencoder.pt")
    with pytest.raises(ArtifactError, match=r"normalises each token .* take version 4"):
        load_sae(folder)
    torch.save(openai_state(activation="Identity"), folder / "autoencoder.pt")
    with pytest.raises(ArtifactError, match="activation 'Identity', which is not read"):
        load_sae(folder)


def test_a_converted_sae_is_native_afterwards(tmp_path: Path):
    path, _ = llama_scope(tmp_path / "llama")
    save_sae(load_sae(path), tmp_path / "native")
    assert_same(load_sae(path), load_sae(tmp_path / "native"), exactly=True)


def test_a_shape_that_no_matrix_has_is_named(tmp_path: Path):
    write_npz(tmp_path, four() | {"W_enc": torch.ones(5), "threshold": torch.ones(D_SAE)})
    with pytest.raises(ArtifactError, match=r"W_enc of shape \[5\], but it must be a matrix"):
        load_sae(tmp_path)


def test_arrays_that_are_no_weights_are_refused(tmp_path: Path):
    tensors: dict[str, Any] = {name: tensor.numpy() for name, tensor in four().items()}
    for threshold, sentence in ((np.ones(D_SAE, dtype="U3"), "of type <U3"), (np.full(D_SAE, np.nan), "not finite")):
        np.savez(tmp_path / "params.npz", **tensors, threshold=threshold)
        with pytest.raises(ArtifactError, match=sentence):
            load_sae(tmp_path)


def test_a_workspace_of_another_tool_names_its_saes(tmp_path: Path):
    for layer in (3, 5):
        sparsify(tmp_path / f"layers.{layer}")
    with pytest.raises(ArtifactError, match=r"holds several sae directories \(layers\.3, layers\.5\)"):
        load_sae(tmp_path)
    for index in (0, 1):
        dictionary_learning(tmp_path / "run" / f"trainer_{index}", with_k(), dict_class="BatchTopKSAE")
        if not index:
            assert load_sae(tmp_path / "run").cfg.arch == "batchtopk"
    with pytest.raises(ArtifactError, match=r"holds several SAEs \(trainer_0, trainer_1\); name the one you mean"):
        load_sae(tmp_path / "run")
