"""The one place that touches pickle: state dicts in the files of ``torch.save``, as of dictionary_learning.

They are read with ``weights_only=True`` and in no other way, so that code in them is refused and not run. What is
written is a flat table of tensors.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import ArtifactError
from saelab.sae.formats.files import MAX_HEADER_BYTES, checked


def read_pt(path: Path) -> dict[str, Any]:
    """The state dict in a file of ``torch.save``, read with ``weights_only=True``: code in it is refused, not run.

    Raises:
        ArtifactError: missing, damaged, an old pickle file without a zip around it, or more than tensors and numbers.
    """
    size = checked(path).stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED or e.file_size > size]
            pickles = [e.file_size for e in entries if e.filename.endswith(".pkl")]
            damaged = None if packed or sum(e.file_size for e in entries) > size else archive.testzip()
    except Exception as error:  # zipfile's errors are of many kinds, and any of them means a damaged file
        raise ArtifactError(
            f"{path} is damaged or not in the zip layout of torch.save ({error}); save it again with torch.save"
        ) from error
    if packed or sum(e.file_size for e in entries) > size:
        raise ArtifactError(f"{path} is packed more tightly than torch.save does, so it is not opened; save it again")
    if damaged or sum(pickles) > MAX_HEADER_BYTES:
        raise ArtifactError(f"{path} is damaged ({damaged or 'its table of contents is too long'}); copy it again")
    try:
        # mapped, a tensor that claims more than its record is cut off at the end of the file instead of read beyond it
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler's errors are of many kinds, and any of them means a file not to trust
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{path} holds more than tensors or is damaged, so it is not loaded and nothing in it was run ({reason}); "
            "save the plain state dict with torch.save"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ArtifactError(f"{path} holds no table of tensors; save the state dict of the SAE with torch.save")
    _check_records(path, content, sum(e.file_size for e in entries if "/data/" in e.filename))
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in content.items()}


def _check_records(path: Path, content: dict[str, Any], room: int) -> None:
    """Raise ArtifactError when the tensors of a state dict claim more bytes than its records have."""
    storages = [t.untyped_storage() for t in content.values() if isinstance(t, Tensor) and t.layout == torch.strided]
    claimed = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if claimed > room:
        raise ArtifactError(f"{path} holds {room:,} bytes of tensors that claim {claimed:,}; copy it again")


def write_pt(tensors: dict[str, Tensor], path: Path) -> None:
    """A flat state dict, as ``torch.load(weights_only=True)`` reads it."""
    torch.save(tensors, path)
