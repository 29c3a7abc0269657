"""Loading: the same model from every path, faithful to Hugging Face, and one sentence for each failure."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from saelab.errors import ArtifactError, AssetError, ConfigError
from saelab.models import load as loading
from saelab.models.load import check_fidelity, load_model
from saelab.models.tiny import write_tiny_model


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture
def copied(tiny_model_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_the_same_seed_writes_the_same_bytes(tiny_model_dir, tmp_path):
    state = torch.random.get_rng_state()
    assert digests(write_tiny_model(tmp_path / "again")) == digests(tiny_model_dir)
    assert torch.equal(torch.random.get_rng_state(), state)  # and the caller's random numbers are left alone
    other = digests(write_tiny_model(tmp_path / "other", seed=1))
    assert {name for name, digest in digests(tiny_model_dir).items() if other[name] != digest} == {"model.safetensors"}


def test_a_tiny_model_never_replaces_what_is_there(tiny_model_dir):
    with pytest.raises(ArtifactError, match="already holds something"):
        write_tiny_model(tiny_model_dir)


def test_a_local_directory_boots_with_its_facts(tiny_model, tiny_model_dir):
    assert (tiny_model.d_model, tiny_model.n_layers, tiny_model.context) == (32, 3, 256)
    assert tiny_model.d_vocab == len(tiny_model.tokenizer)
    assert (tiny_model.pad_id, tiny_model.bos_id, tiny_model.eos_id) == (0, 1, 2)
    assert tiny_model.dtype == torch.float32
    assert tiny_model.path_or_id == str(tiny_model_dir)
    assert len(repr(tiny_model)) < 400


def test_hooked_logits_equal_plain_hugging_face(tiny_model):
    assert check_fidelity(tiny_model) == 0.0


def test_hooked_logits_equal_plain_hugging_face_in_bfloat16(tiny_model_dir):
    model = load_model(tiny_model_dir, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert check_fidelity(model) == 0.0
    assert model.logits(model.to_tokens("the sea").ids).dtype == torch.float32


def test_the_fidelity_check_sees_an_edit(tiny_model):
    with (
        tiny_model.edit("blocks.1.hook_resid_post", lambda acts, keep: acts + 1e-3),
        pytest.raises(ArtifactError, match="differs from the plain model"),
    ):
        check_fidelity(tiny_model)


def test_the_weights_hash_follows_the_weights_and_not_the_path(tiny_model, copied):
    assert load_model(copied, device="cpu").weights_sha256 == tiny_model.weights_sha256
    weights = load_file(copied / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    assert load_model(copied, device="cpu").weights_sha256 != tiny_model.weights_sha256


def test_unembedding_and_final_norm_give_the_logits(tiny_model):
    ids = tiny_model.to_tokens("the tower of the north").ids
    resid = tiny_model.capture(ids, ["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
    normed = resid / (resid.pow(2).mean(-1, keepdim=True) + tiny_model.bridge.cfg.eps).sqrt()
    logits = (normed * tiny_model.final_norm_scale()) @ tiny_model.unembed
    torch.testing.assert_close(logits, tiny_model.logits(ids), rtol=1e-4, atol=1e-4)


def test_loading_is_quiet(tiny_model_dir, capfd):
    load_model(tiny_model_dir, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_a_hub_name_works_from_the_cache_without_a_network(tiny_model, tiny_model_dir, tmp_path, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(tiny_model_dir, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_unreachable(monkeypatch):
        model = load_model("someone/tiny", device="cpu")
        assert model.path_or_id == "someone/tiny"
        assert model.weights_sha256 == tiny_model.weights_sha256
        assert check_fidelity(model) == 0.0


@contextlib.contextmanager
def hub_unreachable(monkeypatch):
    """The hub client set to use the network, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(loading, "_hub_is_reachable", lambda: False)
    yield
    assert constants.HF_HUB_OFFLINE is False  # put back


def test_without_a_network_a_hub_name_fails_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_unreachable(monkeypatch), pytest.raises(AssetError, match=r"hub cannot be reached .* 'demo'") as e:
        load_model("someone/no-such-model", device="cpu")
    assert "\n" not in str(e.value)


def test_the_hubs_own_refusals_become_sentences():
    import httpx2
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    response = httpx2.Response(404, request=httpx2.Request("GET", "https://hub.example"))
    for cause, sentence in (
        (GatedRepoError("gated", response=response), "gated .* hf auth login"),
        (RepositoryNotFoundError("unknown", response=response), "neither a directory nor a public model"),
    ):
        with pytest.raises(AssetError, match=sentence), loading._explained("a/b", "a/b"):
            raise OSError("several\nlines") from cause


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/no-such-model"])
def test_a_path_that_is_not_there_is_no_hub_name(name):
    with pytest.raises(AssetError, match="there is no directory"):
        load_model(name, device="cpu")


def test_a_wrong_path_names_its_neighbours(tiny_model_dir):
    with pytest.raises(AssetError, match="did you mean tiny"):
        load_model(tiny_model_dir.parent / "tinny", device="cpu")


def drop_a_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def truncate(path: Path) -> None:
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:5000])


def change_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (drop_a_weight, ArtifactError, r"lack model\.layers\.1\.mlp\.up_proj\.weight"),
        (truncate, ArtifactError, "cannot be loaded"),
        (lambda path: (path / "model.safetensors").unlink(), ArtifactError, "cannot be loaded"),
        (lambda path: (path / "config.json").unlink(), ArtifactError, r"holds no config\.json"),
        (lambda path: (path / "config.json").write_text("{"), ArtifactError, "cannot be loaded"),
        (lambda path: (path / "tokenizer.json").unlink(), ArtifactError, "cannot be loaded"),
        (lambda path: change_config(path, hidden_size=64), ArtifactError, "other shapes than its config"),
        (lambda path: change_config(path, model_type="foo", architectures=["Foo"]), ConfigError, "architecture"),
    ],
)
def test_a_damaged_directory_is_never_half_loaded(copied, damage, error, sentence, capfd):
    damage(copied)
    with pytest.raises(error, match=sentence) as raised:
        load_model(copied, device="cpu")
    assert "\n" not in str(raised.value)
    assert str(copied) in str(raised.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"dtype": "bf16"}, "did you mean bfloat16"),
        ({"dtype": torch.int8}, "not supported"),
    ],
)
def test_impossible_settings_are_named(tiny_model_dir, settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_model(tiny_model_dir, **{"device": "cpu"} | settings)


def test_cuda_is_not_promised_where_there_is_none(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device"):
        load_model(tiny_model_dir, device="cuda")


def test_float16_checkpoints_run_in_float32_on_a_cpu(copied):
    change_config(copied, dtype="float16")
    assert load_model(copied, device="cpu").dtype == torch.float32
