"""Definition of sparse decoding: fill the dense activations, multiply."""

from __future__ import annotations

from torch import Tensor

from saelab_kernels.ragged import Ragged


def sparse_decode(top_acts: Tensor, top_indices: Tensor, W_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """top_acts, top_indices [N, k], W_dec [F, d], b_dec [d] or None -> [N, d]; an index that repeats counts twice."""
    feature_acts = top_acts.new_zeros(len(top_acts), len(W_dec)).scatter_add(1, top_indices, top_acts)
    recon = feature_acts @ W_dec
    return recon if b_dec is None else recon + b_dec


def ragged_decode(active: Ragged, W_dec: Tensor) -> Tensor:
    """The same for a ragged batch, [N, d]."""
    feature_acts = active.acts.new_zeros(len(active.offsets) - 1, len(W_dec))
    feature_acts = feature_acts.index_put((active.tokens, active.features), active.acts, accumulate=True)
    return feature_acts @ W_dec
