"""Files: bitwise round trips, options of the layout, and a sentence for everything that does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelab.errors import ArtifactError
from saelab.sae.base import SAE, Metadata
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.io import load_sae, load_sae_files, new_sae, save_sae
from saelab.sae.jumprelu import JumpReLUConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig

D_IN, D_SAE = 9, 40
METADATA = Metadata(
    model_name="tiny",
    model_sha256="ab" * 32,
    hook_name="blocks.1.hook_resid_post",
    context_size=64,
    dataset="demo",
    prepend_bos=True,
    mean_norm=12.5,
    activation_scale=0.25,
    extra={"neuronpedia_id": "tiny/1"},
)
CONFIGS = [
    ReLUConfig(d_sae=D_SAE, l1_coefficient=0.3),
    ReLUConfig(d_sae=D_SAE, b_dec="zero"),
    TopKConfig(d_sae=D_SAE, k=5, aux_coefficient=0.125, k_aux=3),
    JumpReLUConfig(d_sae=D_SAE),
]


def make(config) -> SAE:
    generator = torch.Generator().manual_seed(2)
    sae = new_sae(config, d_in=D_IN, generator=generator)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "b_dec" or getattr(config, "b_dec", "learned") == "learned":
                parameter += 0.1 * torch.rand(parameter.shape, generator=generator)
    sae.metadata = METADATA
    return sae


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_sae(make(TopKConfig(d_sae=D_SAE, k=5)), tmp_path / "sae")
    return tmp_path / "sae"


def edit_header(path: Path, **changes) -> None:
    header = json.loads((path / "cfg.json").read_text())
    header |= changes
    (path / "cfg.json").write_text(json.dumps(header))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors (None drops one) and forget the checksum, as another tool would."""
    tensors = load_file(path / "sae_weights.safetensors") | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, path / "sae_weights.safetensors")
    header = json.loads((path / "cfg.json").read_text())
    del header["metadata"]["saelab"]["weights_sha256"]
    (path / "cfg.json").write_text(json.dumps(header))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_sae_comes_back_bit_for_bit(config, dtype, tmp_path: Path):
    sae = make(config).to(dtype)
    save_sae(sae, tmp_path)
    loaded = load_sae_files(tmp_path)
    assert loaded.cfg == config
    assert loaded.metadata == METADATA
    assert type(loaded) is type(sae)
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
        assert loaded.state_dict()[name].dtype == dtype
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    acts = torch.randn(6, D_IN, dtype=dtype)
    assert torch.equal(loaded(acts), sae(acts))

    save_sae(loaded, tmp_path / "again")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_batchtopk_is_saved_as_the_jumprelu_sae_that_it_is(tmp_path: Path):
    sae = make(BatchTopKConfig(d_sae=D_SAE, k=5))
    acts = torch.randn(200, D_IN)
    for batch in acts.split(50):
        sae.training_loss(batch)
    save_sae(sae, tmp_path)
    loaded = load_sae_files(tmp_path)
    assert loaded.cfg == JumpReLUConfig(d_sae=D_SAE)
    assert torch.equal(loaded.encode(acts), sae.encode(acts))
    assert (loaded.encode(acts) > 0).sum(1).float().mean().item() == pytest.approx(5, rel=0.1)
    assert loaded.metadata.extra["training_architecture"] == "batchtopk"
    assert loaded.metadata.extra["training_architecture_details"]["k"] == 5


def test_the_layout_is_that_of_sae_lens(saved: Path):
    header = json.loads((saved / "cfg.json").read_text())
    assert {key: value for key, value in header.items() if key != "metadata"} == {
        "architecture": "topk",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "k": 5,
        "rescale_acts_by_decoder_norm": False,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }
    assert header["metadata"]["sae_lens_version"] >= "6"
    assert header["metadata"]["hook_name"] == "blocks.1.hook_resid_post"
    shapes = {name: tuple(t.shape) for name, t in load_file(saved / "sae_weights.safetensors").items()}
    assert shapes == {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    assert not (saved / "sparsity.safetensors").exists()


def test_density_is_saved_as_a_logarithm(tmp_path: Path):
    density = torch.linspace(0, 0.5, D_SAE)
    save_sae(make(ReLUConfig(d_sae=D_SAE)), tmp_path, density=density)
    sparsity = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(10**sparsity, density + 1e-10)


def test_heads_are_flattened_by_sae_lens_only_at_hook_z(tmp_path: Path):
    sae = make(TopKConfig(d_sae=D_SAE, k=5))
    sae.metadata = replace(METADATA, hook_name="blocks.1.attn.hook_z")
    save_sae(sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["reshape_activations"] == "hook_z"


def test_an_sae_without_metadata_comes_back_without(tmp_path: Path):
    sae = make(ReLUConfig(d_sae=D_SAE))
    sae.metadata = Metadata()
    save_sae(sae, tmp_path)
    assert load_sae_files(tmp_path).metadata == Metadata()


def test_a_workspace_with_one_sae_is_enough(saved: Path):
    assert torch.equal(load_sae(saved.parent).W_dec, load_sae(saved).W_dec)
    assert load_sae(str(saved)).d_sae == D_SAE


def test_half_precision_files_are_read_in_float32(saved: Path):
    tensors = load_file(saved / "sae_weights.safetensors")
    edit_tensors(saved, **{name: tensor.bfloat16() for name, tensor in tensors.items()})
    edit_header(saved, dtype="bfloat16")
    loaded = load_sae_files(saved)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.W_dec, tensors["W_dec"].bfloat16().float())


def test_decoder_norms_that_rescale_the_selection_are_folded_in(saved: Path):
    tensors = load_file(saved / "sae_weights.safetensors")
    tensors["W_dec"] *= torch.rand(D_SAE, 1) + 0.5
    edit_tensors(saved, **tensors)
    edit_header(saved, rescale_acts_by_decoder_norm=True)
    acts, norms = torch.randn(10, D_IN), tensors["W_dec"].norm(dim=1)
    pre_acts = ((acts - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]) * norms
    top = pre_acts.topk(5)
    feature_acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
    loaded = load_sae_files(saved)
    torch.testing.assert_close(loaded.encode(acts), feature_acts, rtol=1e-5, atol=1e-6)
    recon = (feature_acts / norms) @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(loaded(acts), recon, rtol=1e-5, atol=1e-6)


def test_a_b_dec_that_is_not_subtracted_is_folded_into_b_enc(saved: Path):
    tensors = load_file(saved / "sae_weights.safetensors")
    edit_header(saved, apply_b_dec_to_input=False)
    acts = torch.randn(10, D_IN)
    pre_acts = acts @ tensors["W_enc"] + tensors["b_enc"]
    torch.testing.assert_close(load_sae_files(saved).pre_acts(acts), pre_acts, rtol=1e-5, atol=1e-5)


def test_files_of_another_tool_need_no_saelab_entry(saved: Path):
    header = json.loads((saved / "cfg.json").read_text())
    del header["metadata"]["saelab"]
    (saved / "cfg.json").write_text(json.dumps(header))
    loaded = load_sae_files(saved)
    assert loaded.cfg == TopKConfig(d_sae=D_SAE, k=5)
    assert loaded.metadata.mean_norm is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"W_enc": None}, r"lacks W_enc, which architecture 'topk' needs"),
        ({"threshold": torch.ones(D_SAE)}, r"holds threshold, which .*; are these of architecture 'jumprelu'"),
        ({"b_mag": torch.ones(D_SAE)}, r"holds b_mag, which .* the two files belong to different SAEs"),
        ({"W_dec": torch.ones(D_SAE, D_IN + 1)}, r"W_dec of shape \[40, 10\], but cfg.json .* says \[40, 9\]"),
        ({"b_enc": torch.ones(1, D_SAE)}, r"b_enc of shape \[1, 40\]"),
        ({"b_dec": torch.full((D_IN,), float("nan"))}, "b_dec that is not finite"),
        ({"W_enc": torch.full((D_IN, D_SAE), float("inf"))}, "W_enc that is not finite"),
        ({"W_enc": torch.ones(D_IN, D_SAE, dtype=torch.int64)}, "W_enc as torch.int64, but weights are floating-point"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, changes, sentence):
    edit_tensors(saved, **changes)
    with pytest.raises(ArtifactError, match=sentence):
        load_sae_files(saved)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architecture": "topkk"}, r"architecture 'topkk', which this version does not read; did you mean topk"),
        ({"architecture": "gated"}, r"architecture 'gated'"),
        ({"architecture": None}, r"architecture None"),
        ({"architecture": "jumprelu"}, r"lacks threshold, which .*'jumprelu' needs; are these of architecture 'topk'"),
        ({"k": D_SAE + 1}, rf"cfg.json does not fit: k must be between 1 and d_sae={D_SAE}, got {D_SAE + 1}"),
        ({"k": 0}, "k must be between 1"),
        ({"k": 2.5}, "k must be of type int, got 2.5"),
        ({"k": None}, "k must be of type int, got None"),
        ({"d_in": 0}, "d_in = 0, but it must be a whole number"),
        ({"d_sae": "40"}, "d_sae = '40'"),
        ({"d_sae": True}, "d_sae = True"),
        ({"d_sae": D_SAE - 1}, "belong to different SAEs"),
        ({"normalize_activations": "layer_norm"}, "normalises its input by 'layer_norm'"),
        ({"metadata": {}}, "in the layout of SAELens before 6"),
        ({"metadata": {"sae_lens_version": "5.11.0"}}, r"in the layout of SAELens 5\.11\.0"),
        ({"metadata": []}, "does not hold the settings of an SAE"),
    ],
)
def test_settings_that_do_not_fit_are_named(saved: Path, changes, sentence):
    edit_header(saved, **changes)
    with pytest.raises(ArtifactError, match=sentence):
        load_sae_files(saved)


def test_a_truncated_a_missing_and_a_flipped_file_are_told_apart(saved: Path):
    weights = saved / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"sae_weights\.safetensors is truncated or no safetensors file"):
            load_sae_files(saved)
    weights.write_bytes(whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])
    with pytest.raises(ArtifactError, match="its checksum differs"):
        load_sae_files(saved)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"there is no .*sae_weights\.safetensors"):
        load_sae_files(saved)
    (saved / "cfg.json").write_text('{"architecture": ')
    with pytest.raises(ArtifactError, match="not readable as JSON"):
        load_sae_files(saved)
    (saved / "cfg.json").unlink()
    with pytest.raises(ArtifactError, match=r"there is no .*cfg\.json"):
        load_sae_files(saved)


def test_weights_that_are_not_finite_are_not_saved_and_the_old_file_stays(saved: Path):
    before = (saved / "sae_weights.safetensors").read_bytes()
    sae = make(TopKConfig(d_sae=D_SAE, k=5))
    with torch.no_grad():
        sae.b_enc[3] = float("nan")
    with pytest.raises(ArtifactError, match=r"b_enc of the SAE .* is not finite, so it is not saved"):
        save_sae(sae, saved)
    assert (saved / "sae_weights.safetensors").read_bytes() == before


def test_a_full_disk_is_a_sentence_and_leaves_no_sae_behind(tmp_path: Path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saelab.sae.io.save_file", full)
    with pytest.raises(ArtifactError, match="no space left to write"):
        save_sae(make(TopKConfig(d_sae=D_SAE, k=5)), tmp_path)
    assert not list(tmp_path.iterdir())
