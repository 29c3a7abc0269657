"""One training step of an autoencoder, feature by feature: gradient, projection, Adam and unit norm in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab_kernels import arguments, compiled, dispatch
from saelab_kernels.grads import feature_grad
from saelab_kernels.step import cpu, reference
from saelab_kernels.step.types import AdamSettings, Layer, RowGrads, SparseGrads

__all__ = ["AdamSettings", "Layer", "RowGrads", "SparseGrads", "feature_step"]


@torch.no_grad()
def feature_step(
    layer: Layer,
    means: Layer,
    squares: Layer,
    sparse: SparseGrads,
    adam: AdamSettings,
    *,
    copies: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Make one step of Adam on ``layer`` in place, with the gradient that ``sparse`` describes; returns its norm.

    ``means`` and ``squares`` are Adam's moments, updated in place. In order: the gradient of each feature is summed
    over its pairs (ascending tokens) and ``sparse.extra`` added; with ``unit_norm`` the part of W_dec's gradient along
    each row is dropped; with ``clip_norm`` everything is scaled to that norm; Adam; rows of W_dec get norm 1 again.
    ``copies`` of W_enc and W_dec in another precision, [F, d] each, are renewed. Deterministic: two runs are bitwise
    equal. The norm is that of the projected gradient before clipping, a scalar.

    Raises:
        TypeError: not floating-point.
        ValueError: shapes that do not fit, or ``adam.step`` below 1.
    """
    _check(layer, means, squares, sparse, adam, copies)
    path = dispatch.choose(layer.W_enc.device, n_features=len(layer.W_enc), k=1).name
    if path == "fused":
        from saelab_kernels.step import fused

        return compiled.or_else(
            "feature_step",
            lambda: fused.feature_step(layer, means, squares, sparse, adam, copies=copies),
            lambda: _written_out(layer, means, squares, sparse, adam, copies),
            strict=dispatch.strict(),
        )
    norm = (cpu if path == "cpu" else reference).feature_step(layer, means, squares, sparse, adam)
    _renew(copies, layer)
    return norm


def _written_out(
    layer: Layer,
    means: Layer,
    squares: Layer,
    sparse: SparseGrads,
    adam: AdamSettings,
    copies: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The step over whole gradient tensors, which the device's other kernels make."""
    gradient = Layer(
        W_enc=feature_grad(sparse.pairs, sparse.pre_grad, sparse.centred),
        W_dec=feature_grad(sparse.pairs, sparse.top_acts, sparse.recon_grad),
        b_enc=sparse.b_enc,
        b_dec=sparse.b_dec,
    )
    reference.add_rows_(gradient, sparse.extra)
    norm = reference.apply(layer, means, squares, gradient, adam)
    _renew(copies, layer)
    return norm


def _renew(copies: tuple[Tensor, Tensor] | None, layer: Layer) -> None:
    if copies is not None:
        copies[0].copy_(layer.W_enc)
        copies[1].copy_(layer.W_dec)


def _check(
    layer: Layer,
    means: Layer,
    squares: Layer,
    sparse: SparseGrads,
    adam: AdamSettings,
    copies: tuple[Tensor, Tensor] | None,
) -> None:
    n_features, width = layer.W_enc.shape
    for name, part in (("layer", layer), ("means", means), ("squares", squares)):
        arguments.check_matrix(f"{name}.W_enc", part.W_enc, rows=n_features, columns=width)
        arguments.check_matrix(f"{name}.W_dec", part.W_dec, rows=n_features, columns=width)
        arguments.check_vector(f"{name}.b_enc", part.b_enc, length=n_features)
        arguments.check_vector(f"{name}.b_dec", part.b_dec, length=width)
    for copy in copies or ():
        arguments.check_matrix("copies", copy, rows=n_features, columns=width)
    arguments.check_matrix("recon_grad", sparse.recon_grad, columns=width)
    arguments.check_matrix("centred", sparse.centred, rows=len(sparse.recon_grad), columns=width)
    arguments.check_vector("b_enc", sparse.b_enc, length=n_features)
    arguments.check_vector("b_dec", sparse.b_dec, length=width)
    if adam.step < 1:
        raise ValueError(f"adam.step counts from 1, got {adam.step}")
