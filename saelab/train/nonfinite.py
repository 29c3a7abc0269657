"""A batch whose loss or gradient is not finite: noticed before any weight changes, and kept for a look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors.torch import save_file
from torch import Tensor

from saelab import atomic
from saelab.errors import TrainingError
from saelab_kernels import SparseGrads

#: Far enough below float32's largest number that squares of vectors of this length can be added up.
_LARGEST = 1e18


class NotFinite(TrainingError):
    """The loss or the gradient of a step is not finite; the weights are those of the step before."""


def is_finite(sparse: SparseGrads) -> bool:
    """Whether the gradient that ``sparse`` describes, and its norm, are finite; costs a pass over the factors.

    No norm is larger than the number of pairs times the largest coefficient times the longest vector.
    """
    n_pairs = max(1, sparse.top_acts.numel())
    parts = [sparse.b_enc.norm(), sparse.b_dec.norm()]
    for coefficients, vectors in ((sparse.pre_grad, sparse.centred), (sparse.top_acts, sparse.recon_grad)):
        if coefficients.numel():
            parts.append(n_pairs * coefficients.abs().amax() * torch.linalg.vector_norm(vectors, dim=1).amax())
    if sparse.extra is not None:
        parts += [sparse.extra.W_enc.norm(), sparse.extra.W_dec.norm()]
    return bool((torch.stack(parts) < _LARGEST).all())  # False for NaN as well


def dump_batch(
    directory: Path,
    step: int,
    acts: Float[Tensor, "batch *slots d_in"],
    positions: Int64[np.ndarray, " batch"] | None,
) -> Path:
    """Write the raw activations of a step, and where in the store its tokens stand; returns the file."""
    path = directory / f"nonfinite_step_{step:09d}.safetensors"
    tensors = {"acts": acts.detach().cpu().contiguous(), "step": torch.tensor(step)}
    if positions is not None:
        tensors["positions"] = torch.from_numpy(positions)
    with atomic.replacing(path) as temporary:
        save_file(tensors, temporary)
    return path
