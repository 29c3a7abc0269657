"""Who does what, when several processes capture into one store: locks that die with their holder.

The queue of work is the store itself: shard n is done once the ledger notes it, in progress while a process holds the
lock on its number, and free otherwise. The locks are POSIX record locks on single bytes of one file beside the store,
so that there is nothing to clean up, and nothing to judge: the system drops a killed process's locks at once. A lock
file made with O_EXCL and holding pid, boot id and host would have to be judged (is that pid alive? is it still the
same process? what of another host?) and taken over by two steps that can race. Record locks also hold between the
machines of one NFS or parallel file system. They exclude processes, not threads of one process.

What if they fail, on a file system that only pretends to lock? A shard's content is a function of its number, and it
is put in place by a rename, so a shard captured twice is the same file twice: only work is lost.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from saelab import atomic
from saelab.errors import ArtifactError

_log = logging.getLogger(__name__)

# which byte of the file stands for what
_CAPTURE, _LEDGER, _FIRST_SHARD = 0, 1, 2

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class Claims:
    """This process's locks on the capture in ``store``, until ``close``."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._file = store.with_name(f"{store.name}.part-claims")
        with atomic.explained(store):
            store.parent.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        self._supported = True

    def found(self) -> bool:
        """Have the capture to oneself, to begin it or to look over what an interrupted one left, until ``share``.

        False: other processes are at it. Where the file system has no locks this is true, and said in the log.
        """
        try:
            alone = self._lock(_CAPTURE, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _log.warning("the file system of %s has no locks, so a second writer would not be noticed", self._store)
            self._supported = False
            return True
        if alone:
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        return alone

    def share(self) -> None:
        """Take part in the capture; waits while another process founds it."""
        self._lock(_CAPTURE, fcntl.LOCK_SH)

    def refusal(self) -> ArtifactError:
        """What to tell a process that wants the capture to itself and cannot have it."""
        founder = os.pread(self._handle, 200, 0).decode("utf-8", "replace").strip("\0\n ")
        return ArtifactError(
            f"{self._store} is being written by another process ({founder or 'unknown'} began it); wait until it is "
            f"done, or help it with: saelab cache --join {self._store}"
        )

    def check_shareable(self) -> None:
        """Raise ArtifactError where the file system has no locks."""
        if not self._supported:
            raise ArtifactError(
                f"the file system of {self._store} has no locks, so processes cannot share a capture there; "
                "capture with one process, or choose another --out"
            )

    @contextlib.contextmanager
    def ledger(self) -> Iterator[None]:
        """Be the only one to write into ledger, log and manifest; waits for others, who take milliseconds."""
        self._lock(_LEDGER, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._lock(_LEDGER, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def shard(self, number: int) -> Iterator[bool]:
        """Claim a shard while the block runs; False: a living process has it."""
        mine = self._lock(_FIRST_SHARD + number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield mine
        finally:
            if mine:
                self._lock(_FIRST_SHARD + number, fcntl.LOCK_UN)

    def close(self) -> None:
        """Give everything up; the last one to leave removes the file."""
        try:
            self._lock(_CAPTURE, fcntl.LOCK_UN)  # or two who leave at once would both find the other still there
            with contextlib.suppress(BlockingIOError, PermissionError):
                if self._supported:
                    fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _CAPTURE)
                if self._is_current():
                    self._file.unlink(missing_ok=True)
        finally:
            os.close(self._handle)

    def _lock(self, byte: int, how: int) -> bool:
        """Whether the lock was to be had; only with LOCK_NB it may not be."""
        if not self._supported:
            return True
        while True:
            try:
                fcntl.lockf(self._handle, how, 1, byte)
            except (BlockingIOError, PermissionError):  # the two answers that POSIX allows
                return False
            if byte != _CAPTURE or how == fcntl.LOCK_UN or self._is_current():
                return True
            self._reopen()

    def _is_current(self) -> bool:
        """Whether the file that is locked is still the one that others find; the last of them may have removed it."""
        try:
            return os.fstat(self._handle).st_ino == self._file.stat().st_ino
        except FileNotFoundError:
            return False

    def _reopen(self) -> None:
        os.close(self._handle)
        self._handle = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
