"""Damage to a store, and a disk that fills up while one is written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab import atomic
from saelab.activations.capture import CacheConfig, capture
from saelab.activations.text import TextConfig
from saelab.cli.show import damage
from saelab.errors import ArtifactError
from saelab.models.load import Model

HOOK = "blocks.1.hook_resid_post"


class Letters(Model):
    """A stand-in for a model: one token a byte, activations out of a table."""

    bos_id = 256
    context = 512  # type: ignore[assignment]
    weights_sha256 = "0" * 64  # type: ignore[misc]

    def __init__(self) -> None:
        self.table = torch.randn(257, 16, generator=torch.Generator().manual_seed(0))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def check_hook(self, name: str) -> str:
        return name

    def hook_width(self, name: str) -> int:
        return 16

    def capture(self, ids: torch.Tensor, hook_names: object, mask: object = None) -> dict[str, torch.Tensor]:
        return {HOOK: self.table[ids]}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CacheConfig:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [{"text": f"Document {i} says {'that ' * (i % 7 + 3)}."} for i in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = TextConfig(source=str(file))
    return CacheConfig(model="letters", hook_names=(HOOK,), text=text, context=16, held_out=0.25, rows_per_shard=24)


@pytest.fixture(scope="module", params=["bfloat16", "int8", "float8_e4m3fn"])
def store(request: pytest.FixtureRequest, config: CacheConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from saelab import config as configs

    plain = configs.to_mapping(config) | {"dtype": request.param}
    out = tmp_path_factory.mktemp("store") / "activations"
    return capture(configs.from_mapping(CacheConfig, plain), out, model=Letters()).path


def check_flip(store: Path, place: float, bit: int) -> None:
    """Flip one bit, ``place`` (0 to 1) of the way through all shards, look for it, and flip it back."""
    assert damage(store, "activations") is None
    shards = sorted(store.glob("shard_*"))
    offset = int(place * sum(file.stat().st_size for file in shards))
    for file in shards:
        if offset < file.stat().st_size:
            break
        offset -= file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ (1 << bit)]))
    try:
        found = damage(store, "activations")
    finally:
        with file.open("r+b") as stream:
            stream.seek(offset)
            stream.write(bytes([byte]))
    assert found is not None, f"bit {bit} of byte {offset} of {file.name}"
    assert file.name in found
    assert "\n" not in found


places, bits = st.floats(0, 1, exclude_max=True), st.integers(0, 7)


@settings(deadline=None, max_examples=20)
@given(places, bits)
def test_any_bit_that_flips_in_a_shard_is_found_and_the_shard_named(store: Path, place: float, bit: int):
    check_flip(store, place, bit)


@pytest.mark.slow
@settings(deadline=None, max_examples=1000)
@given(places, bits)
def test_each_of_a_thousand_flipped_bits_is_found_and_the_shard_named(store: Path, place: float, bit: int):
    check_flip(store, place, bit)


def test_every_bit_of_a_shards_header_counts(store: Path):
    file = sorted(store.glob("shard_*"))[0]
    n_bytes = sum(f.stat().st_size for f in store.glob("shard_*"))
    length = int.from_bytes(file.read_bytes()[:8], "little") + 8
    for offset in range(0, length, 7):
        check_flip(store, (offset + 0.5) / n_bytes, offset % 8)


def test_a_disk_that_is_full_at_any_write_leaves_a_capture_that_can_go_on(
    config: CacheConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from saelab import rundir

    monkeypatch.setattr(rundir, "environment", dict)
    whole = capture(config, tmp_path / "whole", model=Letters())
    files = [*(shard.file for shard in whole.manifest.shards), "manifest.json", "documents.jsonl"]
    expected = {name: atomic.sha256(whole.path / name) for name in files}
    budget = {"left": 10**9}
    fsync = os.fsync

    def full(handle: int) -> None:
        budget["left"] -= 1
        if budget["left"] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    capture(config, tmp_path / "counted", model=Letters())
    n_writes = 10**9 - budget["left"]
    assert n_writes > 20
    for n in range(0, n_writes, 2):  # each file is synced, and then its directory
        out = tmp_path / f"out{n}"
        budget["left"] = n
        with pytest.raises(ArtifactError, match=r"no space left to write .*; free some disk space") as caught:
            capture(config, out, model=Letters())
        assert "\n" not in str(caught.value)
        assert not list(out.glob("*.part-*"))
        budget["left"] = 10**9
        capture(config, out, model=Letters(), resume=True)
        assert {name: atomic.sha256(out / name) for name in files} == expected
    assert not list(tmp_path.glob("*.part-*"))
