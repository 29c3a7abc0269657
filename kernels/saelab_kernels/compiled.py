"""What every Triton kernel here shares: how it is run without a GPU, how it is compiled ahead of time, how it may fail.

Triton decides when a module is imported whether its kernels are compiled or interpreted (TRITON_INTERPRET=1), so one
process holds kernels of one kind only. The interpreter computes with bfloat16 bit patterns as if they were integers
(loads, stores and casts are right), so every kernel takes ``UPCAST`` and casts to float32 first where it is set.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch

_log = logging.getLogger(__name__)
_failed: dict[str, str] = {}
_Result = TypeVar("_Result")

#: Whether the kernels of this process are interpreted, on CPU tensors: for tests, thousands of times slower.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Variant(NamedTuple):
    """One way in which a kernel is launched, described without tensors so that it can be compiled without a GPU."""

    kernel: Any
    arguments: Mapping[str, str]
    """Type of each argument that is not a constant, in Triton's words: "*bf16", "*fp32", "*i64", "i32"."""
    constants: Mapping[str, Any]
    """Value of each ``tl.constexpr`` argument."""
    divisible: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16, as the launcher would find; pointers always are."""
    options: Mapping[str, int] = {"num_warps": 4}
    """num_warps, num_stages."""
    uses_mma: bool = False
    """Whether the code must contain tensor-core instructions."""


@functools.lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why Triton kernels cannot run in this process, or None if they can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "there is no CUDA device, and TRITON_INTERPRET=1 was not set when Python started"


def or_else(name: str, compiled: Callable[[], _Result], otherwise: Callable[[], _Result], *, strict: bool) -> _Result:
    """``compiled()``; if its kernel cannot be built for this device, ``otherwise()`` from then on, logged once.

    ``strict`` lets the failure through: for tests, and for a path that was asked for by name.
    """
    if name in _failed and not strict:
        return otherwise()
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return compiled()
    except (CompilationError, OutOfResources, PTXASError) as error:
        if strict:
            raise
        _failed[name] = str(error)
        _log.warning("%s could not be compiled for this device and runs in torch instead: %s", name, error)
        return otherwise()
