"""Where an SAE belongs, as a settings file tells it: checked on the way in, and our own entry on the way out.

The entry ``saelab`` stands in the settings of every format that has some; other tools ignore it. It restores what the
format has no place for, and holds the hash of the weights, so that a damaged or exchanged file is noticed.
"""

from __future__ import annotations

import dataclasses
import math
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from saelab import atomic
from saelab import config as configs
from saelab.errors import ArtifactError
from saelab.sae.base import SAE, Metadata, Source
from saelab.sae.formats.files import shown, table


def entry(sae: SAE, weights_sha256: str, *, whole: bool = True) -> dict[str, Any]:
    """Our entry for ``sae``; with ``whole`` also what SAELens has its own places for."""
    meta = sae.metadata
    told = {
        "model_name": meta.model_name or None,
        "hook_name": meta.hook_name or None,
        "context_size": meta.context_size,
        "dataset_path": meta.dataset,
        "prepend_bos": meta.prepend_bos,
    }
    return {
        "version": packages.version("saelab"),
        "config": configs.to_mapping(sae.cfg),
        "weights_sha256": weights_sha256,
        "model_sha256": meta.model_sha256,
        "mean_norm": meta.mean_norm,
        "activation_scale": meta.activation_scale,
        "sources": [dataclasses.asdict(source) for source in meta.sources],
        "reads": meta.reads,
        **(told if whole else {}),
    }


def check_hash(weights: Path, ours: dict[str, Any], *, settings: str) -> None:
    """Raise ArtifactError when the weights are not those that our entry was written for."""
    expected = ours.get("weights_sha256")
    if expected and atomic.sha256(weights) != expected:
        raise ArtifactError(
            f"{weights} is damaged or not the file that {settings} describes (its checksum differs); copy it again"
        )


def metadata_of(path: Path, told: dict[str, Any], ours: dict[str, Any], extra: dict[str, Any]) -> Metadata:
    """``told`` is in SAELens's words (hook_name, ...), ``ours`` our entry.

    Raises:
        ArtifactError: a value of the wrong type.
    """
    return Metadata(
        model_name=_text(told, "model_name", path) or "",
        model_sha256=_text(ours, "model_sha256", path),
        hook_name=_text(told, "hook_name", path) or "",
        context_size=_count(told, "context_size", path),
        dataset=_text(told, "dataset_path", path),
        prepend_bos=bool(told.get("prepend_bos", True)),
        mean_norm=_number(ours, "mean_norm", path),
        activation_scale=_number(ours, "activation_scale", path),
        sources=_sources(told, ours, path),
        reads="difference" if ours.get("reads") == "difference" else "activations",
        extra=extra,
    )


def our_entry(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The entry ``saelab`` of a settings file, empty in files of other tools; its ``config`` is a table.

    Raises:
        ArtifactError: it is no table.
    """
    ours = {} if content.get("saelab") is None else table(content, "saelab", path)
    return ours | {"config": table(ours, "config", path)}


def _sources(told: dict[str, Any], ours: dict[str, Any], path: Path) -> tuple[Source, ...]:
    """Those of our entry; in files of SAELens, input and target of a transcoder."""
    entries = ours.get("sources") or []
    if not entries and _text(told, "hook_name_out", path) is not None:
        model = _text(told, "model_name", path)
        entries = [{"model_name": model, "hook_name": told.get(name)} for name in ("hook_name", "hook_name_out")]
    if not isinstance(entries, list) or not all(isinstance(source, dict) for source in entries):
        raise ArtifactError(f"{path} has sources = {shown(entries)}, but it must be a list of tables; correct the file")
    return tuple(
        Source(
            model_name=_text(source, "model_name", path) or "",
            model_sha256=_text(source, "model_sha256", path),
            hook_name=_text(source, "hook_name", path) or "",
        )
        for source in entries
    )


def _text(content: dict[str, Any], name: str, path: Path) -> str | None:
    value = content.get(name)
    if value is not None and not (isinstance(value, str) and value.isprintable()):
        raise ArtifactError(f"{path} has {name} = {shown(value)}, but it must be text; correct the file")
    return value


def _count(content: dict[str, Any], name: str, path: Path) -> int | None:
    value = content.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise ArtifactError(
            f"{path} has {name} = {shown(value)}, but it must be a whole number from 1; correct the file"
        )
    return value


def _number(content: dict[str, Any], name: str, path: Path) -> float | None:
    value = content.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArtifactError(f"{path} has {name} = {shown(value)}, but it must be a number; correct the file")
    return float(value)
