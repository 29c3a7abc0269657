"""SAEs on the hub: names of places, what is downloaded, and what is told when it fails. Nothing here goes online."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from format_samples import D_IN, assert_same, make

from saelab.errors import ArtifactError, AssetError, ConfigError
from saelab.sae.formats.hub import HubId, parsed
from saelab.sae.io import load_sae, save_sae, save_sae_as


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("owner/name", HubId("owner/name", "", None)),
        ("owner/name/layers.5", HubId("owner/name", "layers.5", None)),
        ("hf://owner/name", HubId("owner/name", "", None)),
        ("hf://owner/name@v1.0/a/b/", HubId("owner/name", "a/b", "v1.0")),
    ],
)
def test_places_on_the_hub_are_understood(text, place):
    assert parsed(text) == place


@pytest.mark.parametrize(
    "text", ["runs", "/absolute/path", "./a/b", "../a/b", "a//b", "a/b c", "~/sae", "", "C:\\a\\b"]
)
def test_what_does_not_look_like_one_is_a_path(text):
    assert parsed(text) is None


def test_a_mistyped_path_is_not_looked_up(tmp_path: Path, monkeypatch):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parsed("runs/demmo") is None
    with pytest.raises(ArtifactError, match="there is no directory runs/demmo; did you mean demo"):
        load_sae("runs/demmo")


@pytest.mark.parametrize(
    "text",
    [
        "hf://owner",
        "hf:///etc",
        "hf://owner/../x",
        "hf://owner/name/../..",
        "hf://o/n@a b",
        "hf://o/n/.hidden",
        "hf://",
    ],
)
def test_places_that_climb_are_refused(text):
    with pytest.raises(ConfigError, match="names no place on the hub"):
        load_sae(text)


def test_only_the_needed_files_of_one_folder_are_fetched(tmp_path: Path, monkeypatch):
    sae, asked = make("topk"), []
    save_sae_as(sae, tmp_path / "hub" / "layers.5", format="sparsify")

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_same(sae, load_sae("hf://owner/name@main/layers.5"), exactly=True)
    assert_same(sae, load_sae("owner/name/layers.5", format="sparsify"), exactly=True)
    repository, options = asked[0]
    assert (repository, options["revision"]) == ("owner/name", "main")
    assert {"layers.5/sae.safetensors", "layers.5/cfg.json", "layers.5/ae.pt"} <= set(options["allow_patterns"])
    assert not any("*" in pattern for pattern in options["allow_patterns"])
    with pytest.raises(AssetError, match=r"owner/name has no SAE in its top folder; name its folder, as in hf://"):
        load_sae("owner/name")


def test_the_cache_of_the_hub_serves_without_a_connection(tmp_path: Path, monkeypatch):
    sae, root = make("jumprelu"), tmp_path / "models--owner--name"
    save_sae(sae, tmp_path / "saved")
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    revision = "0123456789abcdef0123456789abcdef01234567"
    (root / "refs" / "main").write_text(revision)
    folder = root / "snapshots" / revision / "layer_3"
    folder.mkdir(parents=True)
    for number, file in enumerate((tmp_path / "saved").iterdir()):
        (root / "blobs" / str(number)).write_bytes(file.read_bytes())
        (folder / file.name).symlink_to(Path("../../../blobs") / str(number))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded = load_sae("hf://owner/name/layer_3")
    assert_same(sae, loaded, exactly=True)
    assert loaded.d_in == D_IN
    with pytest.raises(AssetError, match=r"owner/other could not be fetched from the hub .*; check the name"):
        load_sae("hf://owner/other/layer_3")


@pytest.mark.parametrize(
    "error", [ConnectionError("no route\nto host"), OSError(28, "no space"), ValueError("bad\nname")], ids=repr
)
def test_the_hubs_own_errors_are_one_sentence(error, monkeypatch):
    def fail(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(AssetError, match="could not be fetched from the hub") as caught:
        load_sae("hf://owner/name")
    assert "\n" not in str(caught.value)
