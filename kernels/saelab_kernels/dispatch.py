"""Which implementation runs, and why.

``SAELAB_KERNELS`` chooses: ``auto`` (default), ``reference`` (dense torch, the definition), ``cpu`` (tuned torch),
``fused`` (Triton). It is read at every call, so a test or a notebook can switch within one process.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from typing import NamedTuple

import torch
from torch import Tensor

from saelab_kernels import compiled

_log = logging.getLogger(__name__)

PATHS = ("auto", "reference", "cpu", "fused")

#: The sparse path wins while k is at most this share of F: measured on a CPU; on a GPU what gathering k rows costs
#: beside a dense product at 790 TFLOP/s and 4.3 TB/s (both: kernels/README.md).
MAX_ACTIVE_SHARE = {"cpu": 1 / 8, "cuda": 1 / 184}


class Choice(NamedTuple):
    """What was chosen ("reference", "cpu", "fused"; "bfloat16", "float32") and the reason in words."""

    name: str
    reason: str


def choose(device: torch.device, *, n_features: int, k: int, gathers: bool = True) -> Choice:
    """The path for tensors on ``device`` with k of ``n_features`` features active for each token.

    ``gathers``: whether the operation reads k rows of a weight matrix for each token, which a GPU does worth its while
    only where k is a small share of the features.

    Raises:
        ValueError: SAELAB_KERNELS names no path, or one that cannot run on these tensors in this process.
    """
    asked = os.environ.get("SAELAB_KERNELS", "auto")
    if asked not in PATHS:
        raise ValueError(f"SAELAB_KERNELS must be one of {', '.join(PATHS)}, got {asked!r}; unset it for auto")
    if asked == "cpu" and device.type != "cpu":
        raise ValueError(f"SAELAB_KERNELS=cpu, but the tensors are on {device}; unset it or move them to the CPU")
    if asked == "fused":
        reason = compiled.unavailable()
        if reason is None and device.type == "cpu" and not compiled.INTERPRETED:
            reason = "the tensors are on the CPU; move them to the GPU"
        if reason:
            raise ValueError(f"SAELAB_KERNELS=fused, but {reason}; or unset it")
    if asked != "auto":
        return Choice(asked, f"SAELAB_KERNELS={asked}")
    if device.type not in MAX_ACTIVE_SHARE:
        return _stated(Choice("reference", f"there is no tuned path for {device.type}"))
    share = MAX_ACTIVE_SHARE[device.type]
    if gathers and k > share * n_features:
        reason = f"k={k} is more than 1/{1 / share:g} of {n_features} features: dense is faster"
        return _stated(Choice("reference", reason))
    if device.type == "cpu":
        return Choice("cpu", "the tensors are on the CPU and few features are active")
    if reason := compiled.unavailable():
        return _stated(Choice("reference", reason))
    return Choice("fused", "the tensors are on a GPU and few features are active")


def strict() -> bool:
    """Whether a path was asked for by name, so that nothing may stand in for it."""
    return os.environ.get("SAELAB_KERNELS", "auto") != "auto"


@functools.lru_cache(maxsize=1)
def candidate_gemm() -> Choice:
    """The precision in which this CPU finds candidates faster: "bfloat16" or "float32". Timed once a process (~5 ms).

    Only speed depends on it: candidates are always rescored in float32, so a noisy measurement changes no result.
    """
    seconds = {dtype: _matmul_seconds(dtype) for dtype in (torch.bfloat16, torch.float32)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    if ratio > 1.1:
        return Choice("bfloat16", f"a bfloat16 matrix product is {ratio:.1f}x as fast as float32 on this CPU")
    return _stated(Choice("float32", f"a bfloat16 matrix product is only {ratio:.1f}x as fast as float32 on this CPU"))


def bfloat16_units(device: torch.device) -> bool:
    """Whether ``device`` has instructions for bfloat16 products: for results whose bits depend on the answer, which a
    measurement must not decide. False for a device that is neither a CPU nor CUDA."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _matmul_seconds(dtype: torch.dtype) -> float:
    # small enough that a CPU without bfloat16 instructions, a hundred times slower, still answers at once
    left, right = torch.ones(128, 256, dtype=dtype), torch.ones(512, 256, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first one builds the kernel
        start = time.perf_counter()
        left @ right.T
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


@functools.lru_cache(maxsize=64)
def _stated(choice: Choice) -> Choice:
    """``choice``, logged the first time it is made."""
    _log.info("saelab_kernels uses %s: %s", choice.name, choice.reason)
    return choice


def path_for(weights: Tensor, k: int, *, gathers: bool = True, dtype: torch.dtype = torch.float32) -> str:
    """Name of the path for feature-major ``weights`` [F, d] and k active features, computing in ``dtype``.

    Float64 is for checks: the fused kernels add in float32, so the reference takes their place.
    """
    path = choose(weights.device, n_features=len(weights), k=k, gathers=gathers).name
    return "reference" if path == "fused" and dtype != torch.float32 else path
