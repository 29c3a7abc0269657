"""Definition of the feature-major training step: gradients, projection, clipping, Adam and unit norm in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab_kernels.grads import reference as grads
from saelab_kernels.step.types import AdamSettings, Layer, RowGrads, SparseGrads


def feature_step(layer: Layer, means: Layer, squares: Layer, sparse: SparseGrads, adam: AdamSettings) -> Tensor:
    """Update ``layer`` and both moments in place; returns the norm of the gradient before clipping, a scalar."""
    return apply(layer, means, squares, written_out(sparse), adam)


def written_out(sparse: SparseGrads) -> Layer:
    """The gradient of every parameter as a tensor of its shape."""
    pairs = sparse.pairs
    acts, pre = (values.flatten()[pairs.order] for values in (sparse.top_acts, sparse.pre_grad))
    gradient = Layer(
        W_enc=grads.weighted_sums(pairs, pre, sparse.centred),
        W_dec=grads.weighted_sums(pairs, acts, sparse.recon_grad),
        b_enc=sparse.b_enc,
        b_dec=sparse.b_dec,
    )
    add_rows_(gradient, sparse.extra)
    return gradient


def add_rows_(gradient: Layer, extra: RowGrads | None) -> None:
    """Add a gradient of some rows, in place."""
    if extra is not None:
        gradient.W_enc.index_add_(0, extra.rows, extra.W_enc)
        gradient.W_dec.index_add_(0, extra.rows, extra.W_dec)


def apply(layer: Layer, means: Layer, squares: Layer, gradient: Layer, adam: AdamSettings) -> Tensor:
    """The step once the gradient is known; changes ``gradient.W_dec``."""
    if adam.unit_norm:
        along = torch.linalg.vecdot(gradient.W_dec, layer.W_dec)
        gradient.W_dec.addcmul_(along[:, None], layer.W_dec, value=-1)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in gradient]))
    scale = 1.0 if adam.clip_norm is None else (adam.clip_norm / (norm + 1e-6)).clamp(max=1.0)
    for weight, mean, square, grad in zip(layer, means, squares, gradient, strict=True):
        adam_(weight, mean, square, grad * scale, adam)
    if adam.unit_norm:
        norms = torch.linalg.vector_norm(layer.W_dec, dim=1, keepdim=True)
        layer.W_dec.div_(norms.clamp_min(torch.finfo(layer.W_dec.dtype).tiny))
    return norm


def adam_(weight: Tensor, mean: Tensor, square: Tensor, grad: Tensor, adam: AdamSettings) -> None:
    """One Adam update of ``weight`` and its moments, in place."""
    beta1, beta2 = adam.betas
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (square.sqrt() / (1 - beta2**adam.step) ** 0.5).add_(adam.eps)
    weight.addcdiv_(mean, denominator, value=-adam.lr / (1 - beta1**adam.step))
