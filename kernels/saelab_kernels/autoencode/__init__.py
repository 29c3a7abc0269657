"""Encode and decode in one differentiable step, for training: the pairs are sorted once for all weight gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab_kernels import arguments, dispatch
from saelab_kernels.autoencode import reference
from saelab_kernels.decode import sparse_decode
from saelab_kernels.dots import sampled_dot
from saelab_kernels.encode import largest
from saelab_kernels.grads import feature_grad, feature_sum
from saelab_kernels.pairs import pairs_by_feature


class Autoencoded(NamedTuple):
    """What one pass through a TopK autoencoder gives."""

    recon: Tensor  # [N, d]
    top_acts: Tensor  # [N, k], after the ReLU; largest first
    top_indices: Tensor  # int64 [N, k]


def autoencode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int) -> Autoencoded:
    """``encode_topk(x - b_dec, W_enc, b_enc, k)``, then ``sparse_decode(..., W_dec, b_dec)``; one backward for both.

    x [N, d], W_enc and W_dec [F, d], b_enc [F], b_dec [d], which is subtracted before and added after. Differentiable
    once in all tensors, through ``recon`` and ``top_acts``. Ties, NaN and determinism as in ``encode_topk``.

    Raises:
        TypeError: not floating-point.
        ValueError: shapes that do not fit, or k outside 1..F.
    """
    arguments.check_matrix("W_enc", W_enc)
    arguments.check_matrix("W_dec", W_dec, rows=W_enc.shape[0], columns=W_enc.shape[1])
    arguments.check_matrix("x", x, columns=W_enc.shape[1])
    arguments.check_vector("b_enc", b_enc, length=len(W_enc))
    arguments.check_vector("b_dec", b_dec, length=W_enc.shape[1])
    arguments.check_k(k, len(W_enc))
    dtype = arguments.computing_dtype(x, W_enc, b_enc, W_dec, b_dec)
    x, W_enc, b_enc, W_dec, b_dec = (tensor.to(dtype) for tensor in (x, W_enc, b_enc, W_dec, b_dec))
    path = dispatch.path_for(W_enc, k, dtype=dtype)
    if path == "reference":
        return Autoencoded(*reference.autoencode_topk(x, W_enc, b_enc, W_dec, b_dec, k))
    return Autoencoded(*_AutoencodeTopK.apply(x, W_enc, b_enc, W_dec, b_dec, k, path))


class _AutoencodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int, path: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred = x - b_dec
        top_acts, top_indices = largest(centred, W_enc, b_enc, k, path)
        top_acts = top_acts.relu()
        ctx.save_for_backward(centred, W_enc, W_dec, top_acts, top_indices)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(top_indices)
        return sparse_decode(top_acts, top_indices, W_dec, b_dec), top_acts, top_indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, recon_grad: Tensor | None, acts_grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        centred, W_enc, W_dec, top_acts, top_indices = ctx.saved_tensors
        if recon_grad is None:
            recon_grad = torch.zeros_like(centred)
        pre_grad = sampled_dot(recon_grad, W_dec, top_indices)
        if acts_grad is not None:
            pre_grad += acts_grad
        pre_grad *= top_acts > 0
        pairs = pairs_by_feature(top_indices, len(W_enc))
        b_enc_grad = feature_sum(pairs, pre_grad)
        need_x, need_W_enc, _, need_W_dec, *_ = ctx.needs_input_grad
        return (
            sparse_decode(pre_grad, top_indices, W_enc) if need_x else None,
            feature_grad(pairs, pre_grad, centred) if need_W_enc else None,
            b_enc_grad,
            feature_grad(pairs, top_acts, recon_grad) if need_W_dec else None,
            # added to the output and subtracted from the input, whose gradient summed over tokens is b_enc_grad @ W_enc
            recon_grad.sum(0) - b_enc_grad @ W_enc,
            None,
            None,
        )
