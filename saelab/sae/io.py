"""The front door to SAEs on disk: read any known format, write the native one (that of SAELens 6) or a foreign one.

The settings file is written last and holds the hash of the weights: without it there is no SAE, and with it a damaged
one is noticed. The formats themselves are in ``saelab.sae.formats``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from saelab import atomic, rundir
from saelab.errors import ArtifactError, ConfigError, nearest
from saelab.sae.architectures import new_sae
from saelab.sae.base import SAE
from saelab.sae.formats import hub
from saelab.sae.formats.detect import FORMATS, detect, found_in
from saelab.sae.formats.files import shown
from saelab.sae.formats.packed import Packed
from saelab.sae.formats.pt import write_pt
from saelab.sae.formats.weights import Read

__all__ = ["load_sae", "load_sae_files", "new_sae", "read_sae", "save_sae", "save_sae_as"]


def load_sae(path: str | os.PathLike[str], *, device: str | torch.device = "cpu", format: str | None = None) -> SAE:
    """The SAE at ``path``: its folder or file, a workspace such as ``runs/demo`` that holds exactly one, or a place on
    the hub (``owner/name/folder``). ``format`` is found out, unless the folder holds several.

    Raises:
        ArtifactError: there is none, it is unfinished, or its files do not fit each other.
        AssetError: the hub does not have it or cannot be reached.
    """
    return read_sae(path, format=format).sae.to(device)


def load_sae_files(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu", format: str | None = None
) -> SAE:
    """The SAE whose files lie in ``path``, ready for inference: evaluation mode, no gradients, at least float32.

    Raises:
        ArtifactError: a file is missing or damaged, the architecture is unknown, a tensor is missing, superfluous, of
            another shape or not finite, or a setting contradicts the tensors.
    """
    return _read(Path(path), format).sae.to(device)


def read_sae(path: str | os.PathLike[str], *, format: str | None = None) -> Read:
    """As ``load_sae``, with a line for each thing that was folded into the weights on the way.

    Raises:
        ArtifactError: as ``load_sae``.
        AssetError: as ``load_sae``.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long, a loop of links, a NUL
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArtifactError(f"{shown(os.fspath(path))} cannot be opened ({reason}); check the path") from error
    place = hub.parsed(os.fspath(path))
    if place is not None and not Path(path).exists():
        files = [file for form in FORMATS.values() for file in (*form.files, *form.beside)]
        return _read(hub.fetched(place, files), format)
    return _read(_located(Path(path)), format)


def _located(path: Path) -> Path:
    """``path`` itself, or the one SAE in it where it is a workspace, ours or another tool's.

    Raises:
        ArtifactError: there is none, several, or an unfinished one.
    """
    if path.is_file() or (found_in(path) and not (path / "run.json").exists()):
        return path
    inside = sorted(p for p in path.iterdir() if p.is_dir() and found_in(p)) if path.is_dir() else []
    if not inside or any((folder / "cfg.json").exists() for folder in inside):
        return rundir.find(path, "sae")
    if len(inside) > 1:
        raise ArtifactError(f"{path} holds several SAEs ({', '.join(p.name for p in inside)}); name the one you mean")
    return inside[0]


def _read(path: Path, format: str | None) -> Read:
    if not path.is_dir() and not path.is_file():
        raise ArtifactError(f"there is no {path}; give the directory of a saved SAE")
    if path.is_dir() and not found_in(path):
        raise ArtifactError(
            f"there is no {path / 'cfg.json'}; give the directory of a saved SAE, of one of the formats "
            f"{', '.join(FORMATS)}"
        )
    name, path = detect(path, format)
    return FORMATS[name].read(path)


def save_sae(sae: SAE, path: str | os.PathLike[str], *, density: Float[Tensor, " d_sae"] | None = None) -> None:
    """Write ``sae`` into the directory ``path``; BatchTopK is written as the JumpReLU SAE that it is at inference.

    ``density``, the share of tokens on which each feature fires, becomes sparsity.safetensors (as log10).

    Raises:
        ArtifactError: a weight is not a finite number, the disk is full, or the directory is not writable.
    """
    packed = _packed(sae, Path(path), "saelens")
    _write_weights(packed, Path(path))
    if density is not None:
        with atomic.replacing(Path(path) / "sparsity.safetensors") as temporary:
            save_file({"sparsity": torch.log10(density.detach().cpu().float() + 1e-10)}, temporary)
    _write_settings(packed, Path(path))


def save_sae_as(sae: SAE, path: str | os.PathLike[str], *, format: str) -> tuple[str, ...]:
    """Write ``sae`` into the directory ``path`` in a format of another tool; a line for each thing that was folded
    into the weights or that the format has no place for.

    Raises:
        ConfigError: there is no such format, or it is only read.
        ArtifactError: the format cannot hold this architecture, or as ``save_sae``.
    """
    packed = _packed(sae, Path(path), format)
    _write_weights(packed, Path(path))
    _write_settings(packed, Path(path))
    return packed.notes


def _packed(sae: SAE, path: Path, format: str) -> Packed:
    written = {name: form.pack for name, form in FORMATS.items() if form.pack is not None}
    if format not in written:
        if format in FORMATS:
            raise ConfigError(f"the format {format} is read, not written; write one of {', '.join(written)}")
        raise ConfigError(f"there is no format {format!r}; {nearest(format, written)}")
    packed = written[format](sae)
    for name, tensor in packed.tensors.items():
        if not tensor.isfinite().all():
            raise ArtifactError(
                f"{name} of the SAE for {path} holds a value that is not finite, so it is not saved; "
                "take an earlier checkpoint"
            )
    return packed


def _write_weights(packed: Packed, path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path / packed.weights_file) as temporary:
        suffix = Path(packed.weights_file).suffix
        if suffix == ".safetensors":
            save_file(packed.tensors, temporary)
        elif suffix == ".npz":
            with temporary.open("wb") as file:  # numpy appends .npz to a name, but not to a file
                arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in packed.tensors.items()}
                np.savez(file, **arrays)
        else:
            write_pt(packed.tensors, temporary)


def _write_settings(packed: Packed, path: Path) -> None:
    if packed.settings_file is not None:
        sha256 = atomic.sha256(path / packed.weights_file)
        atomic.write_json(path / packed.settings_file, packed.settings(sha256))
