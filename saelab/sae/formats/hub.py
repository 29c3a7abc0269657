"""SAEs on the Hugging Face hub: ``owner/name``, ``owner/name/folder`` or ``hf://owner/name@revision/folder``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from saelab.errors import AssetError, ConfigError

_SCHEME = "hf://"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class HubId(NamedTuple):
    repository: str
    folder: str
    revision: str | None


def parsed(text: str) -> HubId | None:
    """The place on the hub that ``text`` names; None for what is a path on this machine.

    Without ``hf://`` a text is a path as soon as its first part exists here, so that a mistyped path is not looked up.

    Raises:
        ConfigError: ``hf://`` and then something that is no place on the hub.
    """
    named = text.startswith(_SCHEME)
    parts = text.removeprefix(_SCHEME).rstrip("/").split("/")
    if not named and (len(parts) < 2 or Path(parts[0]).exists() or not all(map(_is_name, parts))):
        return None
    owner, name, revision = parts[0], *((parts[1] if len(parts) > 1 else "").partition("@")[::2])
    if not all(map(_is_name, (owner, name, *parts[2:], *([revision] if revision else [])))):
        raise ConfigError(f"{text!r} names no place on the hub; write hf://owner/name or hf://owner/name/folder")
    return HubId(f"{owner}/{name}", "/".join(parts[2:]), revision or None)


def _is_name(part: str) -> bool:
    return bool(_NAME.fullmatch(part)) and ".." not in part


def fetched(place: HubId, files: Sequence[str]) -> Path:
    """The folder on this machine with those of ``files`` that the hub has in ``place``; nothing else is downloaded.

    Raises:
        AssetError: no such repository, none of the files in it, or no connection.
    """
    from huggingface_hub import snapshot_download

    prefix = f"{place.folder}/" if place.folder else ""
    try:
        root = snapshot_download(
            place.repository, revision=place.revision, allow_patterns=[prefix + file for file in files]
        )
    except Exception as error:  # of the hub's client and of whichever HTTP library its version is built on
        reason = " ".join(str(error).split())[:200]
        raise AssetError(f"{place.repository} could not be fetched from the hub ({reason}); check the name") from error
    folder = Path(root) / place.folder
    if not any((folder / file).exists() for file in files):
        raise AssetError(
            f"{place.repository} has no SAE in {place.folder or 'its top folder'}; name its folder, as in "
            f"hf://{place.repository}/FOLDER"
        )
    return folder
