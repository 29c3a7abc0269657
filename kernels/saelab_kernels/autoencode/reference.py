"""Definition of the TopK autoencoder, from the definitions of its two halves; torch differentiates it."""

from __future__ import annotations

from torch import Tensor

from saelab_kernels.decode import reference as decode_reference
from saelab_kernels.encode import reference as encode_reference


def autoencode_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, d] -> recon [N, d], top_acts [N, k] after the ReLU, top_indices [N, k]."""
    top_acts, top_indices = encode_reference.encode_topk(x - b_dec, W_enc, b_enc, k)
    top_acts = top_acts.relu()
    return decode_reference.sparse_decode(top_acts, top_indices, W_dec, b_dec), top_acts, top_indices
