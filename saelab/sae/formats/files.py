"""Reading files that nobody vouches for: every size is checked before memory is taken, and no code in them runs.

What is wrong with a file is one sentence, whichever parser noticed it.
"""

from __future__ import annotations

import json
import math
import stat
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from saelab.errors import ArtifactError, nearest

#: No settings file of an SAE comes near this.
MAX_JSON_BYTES = 16 * 2**20
#: The table of contents of a tensor file; an SAE has about ten tensors.
MAX_HEADER_BYTES = 4 * 2**20
#: Random-looking weights hardly compress; more than this is a bomb.
MAX_COMPRESSION = 20

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def checked(path: Path) -> Path:
    """``path`` if it is a regular file that lies where it seems to lie.

    A link may lead to another place in its own folder, or, as in the cache of the hub, from ``snapshots`` to ``blobs``.

    Raises:
        ArtifactError: it is missing, no regular file, or a link that leads out of its folder.
    """
    try:
        mode = path.stat().st_mode
        target, folder = path.resolve(strict=True), path.parent.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(f"there is no {path}; give the directory of a saved SAE") from None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a forbidden folder, a name with a NUL
        raise ArtifactError(f"{path} cannot be read ({error}); give the directory of a saved SAE") from error
    if not stat.S_ISREG(mode):
        raise ArtifactError(f"{path} is no regular file; give the directory of a saved SAE")
    homes = [folder, *(parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots")]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise ArtifactError(f"{path} is a link to {target}, outside its folder; put the file itself there")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file.

    Raises:
        ArtifactError: missing, too large, not UTF-8, no JSON, nested too deeply, or no table.
    """
    size = checked(path).stat().st_size
    if size > MAX_JSON_BYTES:
        raise ArtifactError(f"{path} has {size:,} bytes, which no settings file of an SAE needs; copy it again")
    try:
        content = json.loads(path.read_text("utf-8"), parse_float=_finite, parse_constant=lambda _: None)
        json.dumps(content, ensure_ascii=False).encode()  # half a character can be read but never written
    except RecursionError:
        raise ArtifactError(f"{path} is nested too deeply to be the settings of an SAE; copy it again") from None
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, a number of thousands of digits
        raise ArtifactError(f"{path} is not readable as JSON ({error}); save the SAE again") from error
    if not isinstance(content, dict):
        raise ArtifactError(f"{path} does not hold the settings of an SAE; give the directory of a saved SAE")
    return content


def _finite(text: str) -> float | None:
    """NaN and infinity, which some tools write for an unknown number, are unknown."""
    return number if math.isfinite(number := float(text)) else None


def shown(value: Any) -> str:
    """A value from a file, short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def whole_number(content: dict[str, Any], name: str, path: Path) -> int:
    """The setting ``name``, which must be a whole number from 1.

    Raises:
        ArtifactError: it is missing or anything else.
    """
    value = content.get(name)
    if type(value) is not int or value < 1:
        raise ArtifactError(
            f"{path} has {name} = {shown(value)}, but it must be a whole number from 1; save the SAE again"
        )
    return value


def table(content: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The table ``name`` within a settings file; an empty one where it is missing.

    Raises:
        ArtifactError: it is there but no table.
    """
    value = content.get(name, {})
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} has {name} = {shown(value)}, but it must be a table; save the SAE again")
    return value


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ArtifactError: missing, truncated, or no such file.
    """
    size = checked(path).stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if header > size - 8:
        raise ArtifactError(f"{path} is truncated or no safetensors file ({size:,} bytes); copy it again")
    if header > MAX_HEADER_BYTES:
        raise ArtifactError(f"{path} has a header of {header:,} bytes, which no SAE needs; copy it again")
    try:
        return load_file(path)
    except Exception as error:  # the parser's own errors are of many kinds, and any of them means a damaged file
        raise ArtifactError(f"{path} is truncated or no safetensors file ({error}); copy it again") from error


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of an npz file; arrays of Python objects are refused, because they are pickles.

    Raises:
        ArtifactError: missing, damaged, an array that is no number, or sizes that the file cannot hold.
    """
    checked(path)
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {}
            for entry in archive.infolist():
                _check_array(path, archive, entry)
                with archive.open(entry) as file:
                    arrays[entry.filename.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
    except ArtifactError:
        raise
    except Exception as error:  # the parser's own errors are of many kinds, and any of them means a damaged file
        raise ArtifactError(f"{path} is damaged or no npz file ({error}); copy it again") from error


def _check_array(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Compare what an array of an npz file says about itself with the room there is, before it is unpacked."""
    file_size = path.stat().st_size
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        start = file.tell()
    if dtype.hasobject or dtype.kind not in "fiu":
        raise ArtifactError(
            f"{path} holds {entry.filename} of type {dtype}, but weights are numbers; save the SAE again"
        )
    if start + math.prod(shape) * dtype.itemsize != entry.file_size:
        raise ArtifactError(f"{path} holds {entry.filename}, whose size differs from its shape {shape}; copy it again")
    if entry.file_size > MAX_COMPRESSION * file_size:
        raise ArtifactError(
            f"{path} would unpack {entry.filename} to {entry.file_size:,} bytes from {file_size:,}; "
            "weights do not compress like that, so get the file from its maker"
        )


def check_names(path: Path, found: Iterable[str], needed: Iterable[str], *, owner: str) -> None:
    """Raise ArtifactError unless ``found`` are the tensors that ``owner`` (a clause such as "a gated SAE") needs."""
    found, needed = set(found), set(needed)
    if missing := sorted(needed - found):
        raise ArtifactError(f"{path} lacks {', '.join(missing)}, which {owner} needs; {nearest(missing[0], found)}")
    if extra := sorted(found - needed):
        raise ArtifactError(
            f"{path} holds {', '.join(extra)[:200]}, which {owner} does not have; is it another format?"
        )


def check_tensor(path: Path, name: str, tensor: Any, shape: tuple[int, ...], *, told_by: str) -> Tensor:
    """``tensor`` if it is one of finite floating-point numbers and has ``shape``, which ``told_by`` says it has.

    Raises:
        ArtifactError: it is not.
    """
    if not isinstance(tensor, Tensor):
        raise ArtifactError(f"{path} holds {name} = {shown(tensor)}, but it must be a tensor; save the SAE again")
    if tuple(tensor.shape) != shape:
        raise ArtifactError(
            f"{path} holds {name} of shape {list(tensor.shape)}, but {told_by} says {list(shape)}; "
            "the two belong to different SAEs"
        )
    if tensor.dtype not in _FLOATS or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ArtifactError(
            f"{path} holds {name} as {tensor.dtype}, but weights are floating-point; save the SAE again"
        )
    if not tensor.isfinite().all():
        raise ArtifactError(f"{path} holds a value in {name} that is not finite; take an older version of it")
    return tensor


def matrix_shape(path: Path, name: str, tensor: Any) -> tuple[int, int]:
    """Rows and columns of the matrix from which a format without settings learns its sizes.

    Raises:
        ArtifactError: it is no matrix.
    """
    if not isinstance(tensor, Tensor) or tensor.dim() != 2 or not tensor.numel():
        shape = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ArtifactError(f"{path} holds {name} of shape {shape}, but it must be a matrix; is it another format?")
    return tensor.shape[0], tensor.shape[1]
