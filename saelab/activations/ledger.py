"""The shards that an unfinished capture has completed, so that a resumed one trusts only what it can check."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import NamedTuple

from saelab import atomic
from saelab.activations.store import ShardEntry, read_manifest, shard_name
from saelab.config import from_mapping, to_mapping
from saelab.errors import ArtifactError, ConfigError

_log = logging.getLogger(__name__)


class _Line(NamedTuple):
    model_sha256: str
    shard: ShardEntry


class Ledger:
    """shards.jsonl in a store's directory: one line a shard, added after the shard is whole on the disk.

    Reading it gives ``shards``: the longest unbroken run from the first on whose files still have the checksums noted.
    Once there is a manifest, that takes the ledger's place.

    Raises:
        ArtifactError: the shards come from another model.
    """

    def __init__(self, store: Path, model_sha256: str) -> None:
        self._file = store / "shards.jsonl"
        self._model_sha256 = model_sha256
        manifest = store / "manifest.json"
        lines = _from_manifest(manifest) if manifest.exists() else _from_file(self._file)
        self.shards: list[ShardEntry] = []
        for line in lines:
            if line.model_sha256 != model_sha256:
                raise ArtifactError(
                    f"{store} was started with another model (weights {line.model_sha256[:12]}, "
                    f"now {model_sha256[:12]}); give that model, or choose another --out"
                )
            file = store / shard_name(len(self.shards))
            if line.shard.file != file.name or not file.exists() or atomic.sha256(file) != line.shard.sha256:
                _log.warning("%s is missing or damaged; capturing again from there", file)
                break
            self.shards.append(line.shard)
        # written anew: half a line at the end would spoil the next one
        atomic.write_bytes(self._file, "".join(map(self._line, self.shards)).encode())
        manifest.unlink(missing_ok=True)

    def add(self, shard: ShardEntry) -> None:
        """Note a shard that is whole on the disk."""
        atomic.append(self._file, self._line(shard))
        self.shards.append(shard)

    def discard(self) -> None:
        """Remove the ledger; the manifest is there."""
        self._file.unlink(missing_ok=True)

    def _line(self, shard: ShardEntry) -> str:
        return json.dumps({"model_sha256": self._model_sha256, "shard": to_mapping(shard)}) + "\n"


def _from_manifest(file: Path) -> list[_Line]:
    manifest = read_manifest(file)
    return [_Line(manifest.model.sha256, shard) for shard in manifest.shards]


def _from_file(file: Path) -> list[_Line]:
    lines: list[_Line] = []
    if not file.exists():
        return lines
    try:
        for line in file.read_text("utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # a kill may have left half a line
                entry = json.loads(line)
                lines.append(_Line(entry["model_sha256"], from_mapping(ShardEntry, entry["shard"])))
    except (ValueError, KeyError, TypeError, ConfigError):
        _log.warning("%s is damaged after line %d; capturing again from there", file, len(lines))
    return lines
