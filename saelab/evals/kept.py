"""What an interrupted evaluation had finished. The same evaluation, started again, takes it from there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from saelab import atomic


class KeptPieces:
    """Results by name in a folder beside the result that they will be part of.

    Their names hold a hash of all that they depend on, so that other settings, another SAE or other activations find
    nothing here.
    """

    def __init__(self, out: Path, content: Mapping[str, Any]) -> None:
        self.folder = out.with_name(f"{out.name}.part-resumable")
        self.digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def get(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is kept under ``name``, or what ``make`` returns, which is then kept.

        Raises:
            ArtifactError: it cannot be written.
        """
        file = self.folder / f"{name}-{self.digest}.json"
        if file.exists():
            return json.loads(file.read_text("utf-8"))
        result = make()
        atomic.write_json(file, result)
        return result

    def discard(self) -> None:
        """Remove the folder, once the result is published."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
