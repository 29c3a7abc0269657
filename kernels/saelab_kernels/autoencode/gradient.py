"""Loss and gradient of an autoencoder without autograd: the gradient stays in the factors of ``feature_step``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saelab_kernels.batchtopk import encode_batchtopk
from saelab_kernels.decode.ragged import ragged_decode
from saelab_kernels.decode_loss import decode_loss
from saelab_kernels.dots.ragged import ragged_dot
from saelab_kernels.encode import encode_topk
from saelab_kernels.grads import feature_sum
from saelab_kernels.pairs import Pairs, pairs_by_feature, ragged_pairs
from saelab_kernels.step import Layer, SparseGrads


class Gradient(NamedTuple):
    """The mean squared error of a batch (mean over N d entries) and its gradient."""

    loss: Tensor  # scalar
    error: Tensor  # recon - x, [N, d]
    acts: Tensor  # activation of each pair: [N, k], or [P] of a ragged batch
    features: Tensor  # int64, same shape
    sparse: SparseGrads


@torch.no_grad()
def topk_gradient(x: Tensor, layer: Layer, k: int) -> Gradient:
    """Of ``mean((recon - x)^2)``, recon as ``autoencode_topk(x, layer, k)`` gives it; x [N, d].

    Raises:
        TypeError: not floating-point.
        ValueError: shapes that do not fit, or k outside 1..F.
    """
    centred = x - layer.b_dec
    top = encode_topk(centred, layer.W_enc, layer.b_enc, k)
    return chosen_gradient(x, centred, layer, top.top_acts, top.top_indices)


@torch.no_grad()
def chosen_gradient(x: Tensor, centred: Tensor, layer: Layer, acts: Tensor, features: Tensor) -> Gradient:
    """The same with k features a token that were chosen otherwise, whose acts are ReLU(centred @ W_enc.T + b_enc).

    x and centred = x - b_dec [N, d], acts and features [N, k]; no feature twice in a row.
    """
    decoded = decode_loss(acts, features, layer.W_dec, layer.b_dec, x)
    pre_grad = decoded.acts_grad.div_(x.numel()).mul_(acts > 0)
    pairs = pairs_by_feature(features, len(layer.W_enc))
    sparse = _factors(pairs, acts, pre_grad, decoded.error, centred, layer)
    return Gradient(decoded.loss.sum() / x.numel(), decoded.error, acts, features, sparse)


@torch.no_grad()
def batchtopk_gradient(x: Tensor, layer: Layer, k: int) -> Gradient:
    """The same with the k N largest activations of the batch (``encode_batchtopk``).

    Raises:
        TypeError: not floating-point.
        ValueError: shapes that do not fit, or k outside 1..F.
    """
    centred = x - layer.b_dec
    active = encode_batchtopk(centred, layer.W_enc, layer.b_enc, k)
    error = ragged_decode(active, layer.W_dec, layer.b_dec).sub_(x)
    pre_grad = ragged_dot(error, layer.W_dec, active).mul_(2 / x.numel())
    pairs = ragged_pairs(active, len(layer.W_enc))
    sparse = _factors(pairs, active.acts, pre_grad, error, centred, layer)
    return Gradient(error.pow(2).mean(), error, active.acts, active.features, sparse)


def _factors(pairs: Pairs, acts: Tensor, pre_grad: Tensor, error: Tensor, centred: Tensor, layer: Layer) -> SparseGrads:
    scale = 2 / error.numel()  # of the mean; on the pairs' coefficients it costs d / k times less than on the error
    b_enc = feature_sum(pairs, pre_grad)
    return SparseGrads(
        pairs=pairs,
        top_acts=acts * scale,
        pre_grad=pre_grad,
        recon_grad=error,
        centred=centred,
        b_enc=b_enc,
        # added to the output and subtracted from the input, whose gradient summed over tokens is b_enc @ W_enc
        b_dec=error.sum(0).mul_(scale) - b_enc @ layer.W_enc,
    )
