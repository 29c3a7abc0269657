"""Correct first, timed second: what must hold before a benchmark may print a speed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Largest root mean square of the error over that of the reference, by the narrowest precision that a result passed
#: through: the rounding of the inputs and, for 16-bit products, of every partial result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class GateError(RuntimeError):
    """A check failed, so there is no speed to report."""


def refuse_interpreted() -> None:
    """Raise GateError where Triton kernels are interpreted: their speed says nothing about the kernels."""
    from saelab_kernels import compiled

    if compiled.INTERPRETED:
        raise GateError(
            "TRITON_INTERPRET=1: interpreted kernels are thousands of times slower, so nothing is timed; unset it"
        )


def refuse_unknown_device(device: str) -> None:
    """Raise GateError where the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise GateError("there is no CUDA device here; give --device cpu")


def rms_error(found: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference; infinite for another shape, NaN or Inf."""
    if found.shape != reference.shape or not torch.isfinite(found).all():
        return math.inf
    if not reference.numel():
        return 0.0
    difference = found.double() - reference.double()
    scale = reference.double().pow(2).mean().sqrt()
    error = difference.pow(2).mean().sqrt()
    return float(error / scale) if scale > 0 else (0.0 if float(error) == 0 else math.inf)


def exact(found: Tensor, reference: Tensor) -> float:
    """0 if all entries are equal, else infinite: for integers."""
    return 0.0 if torch.equal(found, reference) else math.inf
