"""Sparse operations of autoencoders: each with a plain torch definition and tuned paths for the CPU and the GPU.

Shapes: N tokens, d width, F features, k active features a token. Weights are feature-major, [F, d]. Everything here
takes and returns tensors, needs torch, numpy and on a GPU triton alone, and raises ValueError or TypeError.
"""

from __future__ import annotations

from saelab_kernels.above import encode_above
from saelab_kernels.autoencode import Autoencoded, autoencode_topk
from saelab_kernels.autoencode.gradient import Gradient, batchtopk_gradient, chosen_gradient, topk_gradient
from saelab_kernels.batchtopk import encode_batchtopk
from saelab_kernels.decode import sparse_decode
from saelab_kernels.decode.ragged import ragged_decode
from saelab_kernels.decode_loss import DecodeLoss, decode_loss, prefix_pairs
from saelab_kernels.dispatch import Choice, candidate_gemm, choose
from saelab_kernels.dots import sampled_dot
from saelab_kernels.dots.ragged import ragged_dot
from saelab_kernels.encode import TopK, encode_topk
from saelab_kernels.grads import feature_grad, feature_sum
from saelab_kernels.jumprelu import JumpReLU, encode_jumprelu
from saelab_kernels.logps import token_logps
from saelab_kernels.pairs import Pairs, pairs_by_feature, ragged_pairs
from saelab_kernels.ragged import Ragged
from saelab_kernels.revive import AuxDead, aux_dead, aux_loss
from saelab_kernels.step import AdamSettings, Layer, RowGrads, SparseGrads, feature_step

__all__ = [
    "AdamSettings",
    "Autoencoded",
    "AuxDead",
    "Choice",
    "DecodeLoss",
    "Gradient",
    "JumpReLU",
    "Layer",
    "Pairs",
    "Ragged",
    "RowGrads",
    "SparseGrads",
    "TopK",
    "autoencode_topk",
    "aux_dead",
    "aux_loss",
    "batchtopk_gradient",
    "candidate_gemm",
    "choose",
    "chosen_gradient",
    "decode_loss",
    "encode_above",
    "encode_batchtopk",
    "encode_jumprelu",
    "encode_topk",
    "feature_grad",
    "feature_step",
    "feature_sum",
    "pairs_by_feature",
    "prefix_pairs",
    "ragged_decode",
    "ragged_dot",
    "ragged_pairs",
    "sampled_dot",
    "sparse_decode",
    "token_logps",
    "topk_gradient",
]
