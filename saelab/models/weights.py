"""Which weights a model has: a hash over its weight files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from saelab import atomic
from saelab.errors import ArtifactError


def fingerprint(directory: Path, *, hub_id: str) -> str:
    """Hex sha256 over name and content of the weight files in ``directory``, else in the cached snapshot of ``hub_id``.

    Raises:
        ArtifactError: neither holds weights.
    """
    folder = directory if directory.is_dir() else snapshot(hub_id)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ArtifactError(f"{folder} holds no weights (*.safetensors); give a directory in the Hugging Face layout")
    return hashlib.sha256("".join(f"{file.name} {atomic.sha256(file)}\n" for file in files).encode()).hexdigest()


def snapshot(hub_id: str) -> Path:
    """The folder in the Hugging Face cache that holds the files of ``hub_id``.

    Raises:
        ArtifactError: it is not cached.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    if not isinstance(config, str):
        raise ArtifactError(f"{hub_id} is not in the Hugging Face cache any more; load the model again")
    return Path(config).parent
