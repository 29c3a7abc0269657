"""Which format lies in a folder: told by the names of its files, and where two formats share one, by the tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from saelab.errors import ArtifactError, ConfigError, nearest
from saelab.sae.base import SAE
from saelab.sae.formats import dictionary_learning, gemma_scope, llama_scope, openai, saelens, sparsify
from saelab.sae.formats.packed import Packed
from saelab.sae.formats.weights import Read


class Format(NamedTuple):
    """What this version can do with one format."""

    files: tuple[str, ...]
    """Any of these in a folder is a sign of the format; a hub download takes these and ``beside``."""
    beside: tuple[str, ...]
    read: Callable[[Path], Read]
    pack: Callable[[SAE], Packed] | None
    """None where the format is read only."""


#: All of them. SAELens comes first, because it is the native one.
FORMATS: dict[str, Format] = {
    "saelens": Format(("sae_weights.safetensors",), ("cfg.json", "activation_scaler.json"), saelens.read, saelens.pack),
    "sparsify": Format(("sae.safetensors",), ("cfg.json",), sparsify.read, sparsify.pack),
    "dictionary_learning": Format(("ae.pt",), ("config.json",), dictionary_learning.read, dictionary_learning.pack),
    "gemma_scope": Format(("params.npz", "params.safetensors"), ("config.json",), gemma_scope.read, gemma_scope.pack),
    "llama_scope": Format(("checkpoints/final.safetensors",), ("hyperparams.json",), llama_scope.read, None),
    "openai": Format(("autoencoder.pt",), (), openai.read, None),
}


def found_in(folder: Path) -> list[str]:
    """The formats of which a file lies in ``folder``."""
    found = [name for name, form in FORMATS.items() if any((folder / file).exists() for file in form.files)]
    if not found and (folder / "cfg.json").exists():  # its weights are missing, which the reader says
        found = ["saelens"]
    return found


def detect(path: Path, named: str | None = None) -> tuple[str, Path]:
    """The format of the SAE at ``path`` (its folder, or its file of weights), and the path to hand to its reader.

    Raises:
        ConfigError: ``named`` is the name of no format.
        ArtifactError: no format or several fit, or another one than ``named``.
    """
    known = ", ".join(FORMATS)
    if named is not None and named not in FORMATS:
        raise ConfigError(f"there is no format {named!r}; {nearest(named, FORMATS)}")
    if path.is_file():
        form, path = _of_file(path)
        found = [form] if form else []
    else:
        found = found_in(path)
    if not found:
        raise ArtifactError(f"{path} holds no SAE of a known format; the formats are {known}")
    if named is not None and named not in found:
        raise ArtifactError(f"{path} holds an SAE of format {found[0]}, not {named}; leave the format out")
    if named is None and len(found) > 1:
        raise ArtifactError(f"{path} holds files of several formats ({', '.join(found)}); name the one you mean")
    return named or found[0], path


def _of_file(path: Path) -> tuple[str | None, Path]:
    """The format of one file of weights; settings are read from beside it."""
    for name, form in FORMATS.items():
        for file in form.files:
            if path.name == Path(file).name:
                folder = path.parent.parent if "/" in file else path.parent
                return name, path if name in ("openai", "gemma_scope") else folder
    return ("openai", path) if path.suffix == ".pt" else (None, path)
