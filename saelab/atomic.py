"""Files and directories that are either whole or not there, whatever interrupts their writing."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saelab.errors import ArtifactError

_TEMPORARY = ".part-"


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` under a temporary name, fsync it, and rename it to ``path``.

    Raises:
        ArtifactError: the disk is full or the directory is not writable; the old file, if any, is untouched.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)


def write_json(path: Path, value: Mapping[str, Any] | list[Any]) -> None:
    """Write ``value`` as indented JSON with a final newline; NaN is refused, because JSON has none."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def append(path: Path, line: str) -> None:
    """Add ``line`` to the end of ``path``. A kill may leave a part of it, so readers ignore a last line without an end.

    Raises:
        ArtifactError: the disk is full or the file is not writable.
    """
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write(line)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """A full disk, or one that is not writable, is told as one sentence about ``path``.

    Raises:
        ArtifactError: the system refused a write within the block.
    """
    try:
        yield
    except OSError as error:
        _raise_explained(error, path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for one file; when the block ends well the file is fsynced and renamed to ``path``.

    Raises:
        ArtifactError: the system refused the write (full disk, no permission); nothing is left behind.
    """
    temporary = _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what went wrong first is what to report
            temporary.unlink()
        _raise_explained(error, path)
        raise


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A temporary directory; when the block ends well all of it is fsynced and renamed to ``path``.

    ``path`` must not exist yet, or be an older version, which is removed after the new one stands in its place. A kill
    between the two renames leaves neither, so this is for what can be made again.

    Raises:
        ArtifactError: the system refused the write; nothing is left behind.
    """
    temporary = _temporary_name(path)
    _sweep_dead_writers(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        put_directory(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _raise_explained(error, path)
        raise


def put_directory(new: Path, path: Path) -> None:
    """Fsync the directory ``new``, and rename it to ``path`` in the place of an older version.

    A kill leaves the new one whole, under the one name or the other.

    Raises:
        ArtifactError: the system refused.
    """
    with explained(path):
        _sweep_dead_writers(path)
        for file in sorted(new.rglob("*")):
            fsync(file)
        fsync(new)
        if path.exists():
            _swap(new, path)
        else:
            os.replace(new, path)
        fsync(path.parent)


def _swap(new: Path, path: Path) -> None:
    """Put the directory ``new`` in the place of ``path``, and remove what was there."""
    old = _temporary_name(path)
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def sweep(directory: Path) -> None:
    """Remove what interrupted writers left in ``directory``. Call it only by the one process that writes there."""
    for leftover in filter(is_leftover, directory.iterdir()):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _sweep_dead_writers(path: Path) -> None:
    """Remove half-made directories for ``path`` whose writers were killed; one that still lives keeps its own."""
    for leftover in path.parent.glob(f"{glob.escape(path.name)}{_TEMPORARY}*"):
        writer = leftover.name.rpartition(_TEMPORARY)[2].partition("-")[0]
        if writer.isdigit() and not _is_alive(int(writer)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 only asks; unlike /proc it is there on every Unix
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def is_leftover(path: Path) -> bool:
    """Whether ``path`` bears the temporary name of a file or directory that was being written."""
    return _TEMPORARY in path.name


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (created if needed), waiting for another process to release it.

    The system drops the lock when its holder dies, so a kill leaves no stale lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file's, or a directory's, content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{path.name}{_TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:6]}")


def _raise_explained(error: BaseException, path: Path) -> None:
    """Raise a sentence for the failures of the disk; return for everything else."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # safetensors and pyarrow wrap the system's error in their own and keep only its text
    if full or "No space left on device" in str(error) or "File too large" in str(error):
        raise ArtifactError(
            f"no space left to write {path}; free some disk space and run the same command again"
        ) from error
    if isinstance(error, PermissionError) or (isinstance(error, OSError) and error.errno == errno.EROFS):
        raise ArtifactError(f"no permission to write {path}; choose another directory with --out") from error
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        raise ArtifactError(
            f"{path} cannot be written, because a folder on the way to it is a file; choose another --out"
        ) from error
