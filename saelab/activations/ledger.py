"""The shards that an unfinished capture has completed, so that a resumed one trusts only what it can check."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from saelab import atomic
from saelab.activations.store import ShardEntry, read_manifest, shard_number
from saelab.config import from_mapping, to_mapping
from saelab.errors import ArtifactError, ConfigError

_log = logging.getLogger(__name__)


class _Line(NamedTuple):
    model_sha256: str
    shard: ShardEntry | None  # None in the first line: whose shards these are must be known before there is one


class Ledger:
    """shards.jsonl in a store's directory: one line a shard, added after the shard is whole on the disk.

    Several processes may add lines, in any order of shards, each while it alone may write. Once there is a manifest,
    that takes the ledger's place.
    """

    def __init__(self, store: Path, model_sha256: str) -> None:
        self._store = store
        self._file = store / "shards.jsonl"
        self._model_sha256 = model_sha256
        self._n_read = 0  # bytes of the file
        self.shards: dict[int, ShardEntry] = {}
        """What is known so far, by number."""

    @property
    def n_rows(self) -> int:
        return sum(shard.rows for shard in self.shards.values())

    def recover(self) -> None:
        """Keep of what an interrupted capture noted the shards whose files still have the checksums noted.

        Raises:
            ArtifactError: the shards come from another model.
        """
        manifest = self._store / "manifest.json"
        lines = _from_manifest(manifest) if manifest.exists() else self._intact_lines()
        self.shards = {}
        for number, shard in self._checked(lines):
            file = self._store / shard.file
            if not file.exists() or atomic.sha256(file) != shard.sha256:
                _log.warning("%s is missing or damaged; capturing it again", file)
            else:
                self.shards[number] = shard
        # written anew: half a line at the end would spoil the next one
        kept = [self.shards[number] for number in sorted(self.shards)]
        data = "".join(self._line(shard) for shard in (None, *kept)).encode()
        atomic.write_bytes(self._file, data)
        self._n_read = len(data)
        manifest.unlink(missing_ok=True)

    def refresh(self) -> None:
        """Learn what other processes have added meanwhile.

        Raises:
            ArtifactError: they capture another model, or the ledger is damaged.
        """
        try:
            with self._file.open("rb") as file:
                file.seek(self._n_read)
                data = file.read()
        except FileNotFoundError:  # one of them has finished the store
            lines = _from_manifest(self._store / "manifest.json")
        else:
            data = data[: data.rfind(b"\n") + 1]  # a kill may have left half a line
            self._n_read += len(data)
            try:
                lines = [_parsed(line) for line in data.decode().splitlines()]
            except _UNREADABLE as error:
                raise ArtifactError(
                    f"{self._file} is damaged ({error}); stop all processes that capture there and continue with: "
                    f"saelab cache --resume {self._store}"
                ) from error
        self.shards.update(self._checked(lines))

    def add(self, number: int, shard: ShardEntry) -> None:
        """Note a shard that is whole on the disk. Call it only while no other process may write."""
        _drop_torn_line(self._file)
        atomic.append(self._file, self._line(shard))
        self.shards[number] = shard

    def discard(self) -> None:
        """Remove the ledger; the manifest is there."""
        self._file.unlink(missing_ok=True)

    def _line(self, shard: ShardEntry | None) -> str:
        plain = None if shard is None else to_mapping(shard)
        return json.dumps({"model_sha256": self._model_sha256, "shard": plain}) + "\n"

    def _checked(self, lines: Iterable[_Line]) -> Iterator[tuple[int, ShardEntry]]:
        """The shards of these lines with their numbers; the first that is of another model is an error."""
        for model_sha256, shard in lines:
            if model_sha256 != self._model_sha256:
                raise ArtifactError(
                    f"{self._store} was started with another model (weights {model_sha256[:12]}, "
                    f"now {self._model_sha256[:12]}); give that model, or choose another --out"
                )
            number = None if shard is None else shard_number(shard.file)
            if shard is not None and number is not None:
                yield number, shard

    def _intact_lines(self) -> list[_Line]:
        """The lines of the file as far as they can be read."""
        lines: list[_Line] = []
        if not self._file.exists():
            return lines
        try:
            for line in self._file.read_text("utf-8").splitlines(keepends=True):
                if line.endswith("\n"):  # a kill may have left half a line
                    lines.append(_parsed(line))
        except _UNREADABLE:
            _log.warning("%s is damaged after line %d; capturing again what it lost", self._file, len(lines))
        return lines


_UNREADABLE = (ValueError, KeyError, TypeError, ConfigError)


def _parsed(line: str) -> _Line:
    entry = json.loads(line)
    shard = entry["shard"]
    return _Line(entry["model_sha256"], None if shard is None else from_mapping(ShardEntry, shard))


def _from_manifest(file: Path) -> list[_Line]:
    manifest = read_manifest(file)
    return [_Line(manifest.model.sha256, shard) for shard in manifest.shards]


def _drop_torn_line(file: Path) -> None:
    """Cut off a last line without an end: its writer was killed, and no longer needs it."""
    if not file.exists():
        return
    with file.open("r+b") as stream:
        if stream.seek(0, 2) == 0:
            return
        stream.seek(-1, 2)
        if stream.read() != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
