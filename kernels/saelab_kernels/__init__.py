"""Sparse operations of a TopK SAE: each with a plain torch definition and a tuned path.

Shapes: N tokens, d width, F features, k active features a token. Weights are feature-major, [F, d]. Everything here
takes and returns tensors, needs torch and numpy alone, and raises ValueError or TypeError.
"""

from __future__ import annotations

from saelab_kernels.autoencode import Autoencoded, autoencode_topk
from saelab_kernels.decode import sparse_decode
from saelab_kernels.dispatch import Choice, candidate_gemm, choose
from saelab_kernels.dots import sampled_dot
from saelab_kernels.encode import TopK, encode_topk
from saelab_kernels.grads import feature_grad, feature_sum
from saelab_kernels.pairs import Pairs, pairs_by_feature

__all__ = [
    "Autoencoded",
    "Choice",
    "Pairs",
    "TopK",
    "autoencode_topk",
    "candidate_gemm",
    "choose",
    "encode_topk",
    "feature_grad",
    "feature_sum",
    "pairs_by_feature",
    "sampled_dot",
    "sparse_decode",
]
