"""The training step on the CPU, a block of features at a time: their gradient is used while it is in the cache.

Gradients of [F, d] are neither allocated nor read back. At F = 16,384 and d = 768 that takes the two matrices'
gradients, projection, Adam and normalisation from 68 to 25 ms: a fresh tensor of 50 MB costs 10 ms in page faults.
Clipping needs the norm of the whole gradient before the first weight may change; the blocks are then computed twice,
unless a bound on the norm that costs nothing already stays below the limit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saelab_kernels.bags import weighted_bags
from saelab_kernels.grads.reference import sums
from saelab_kernels.step import reference
from saelab_kernels.step.types import AdamSettings, Layer, RowGrads, SparseGrads

#: One block of one matrix; some eight such blocks are in use at a time (tried: 128 kB to 2 MB).
_BLOCK_BYTES = 2**20


class _Block(NamedTuple):
    features: slice
    W_enc: Tensor  # gradient [rows, d]
    W_dec: Tensor  # gradient [rows, d], without the part along unit rows


def feature_step(layer: Layer, means: Layer, squares: Layer, sparse: SparseGrads, adam: AdamSettings) -> Tensor:
    """As the reference, up to rounding."""
    if layer.W_enc.dtype != torch.float32:  # float64 is for checks
        return reference.feature_step(layer, means, squares, sparse, adam)
    biases = torch.stack([sparse.b_enc.norm(), sparse.b_dec.norm()])
    scale = None
    if adam.clip_norm is not None and not _bound(sparse, biases) < adam.clip_norm:
        norm = _total_norm([biases, *(_norms(block) for block in _gradient_blocks(layer, sparse, adam))])
        scale = (adam.clip_norm / (norm + 1e-6)).clamp(max=1.0)
    norms = [biases]
    for block in _gradient_blocks(layer, sparse, adam):
        if scale is None:
            norms.append(_norms(block))
        _update(_rows(layer, block.features), _rows(means, block.features), _rows(squares, block.features),
                (block.W_enc, block.W_dec), scale, adam)  # fmt: skip
        if adam.unit_norm:
            rows = layer.W_dec[block.features]
            rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(torch.finfo(rows.dtype).tiny))
    _update(layer[2:], means[2:], squares[2:], (sparse.b_enc, sparse.b_dec), scale, adam)
    return norm if scale is not None else _total_norm(norms)


def _bound(sparse: SparseGrads, biases: Tensor) -> Tensor:
    """At least the norm of the gradient: a feature's sum of vectors is no longer than the sum of their lengths."""
    norm, pairs = torch.linalg.vector_norm, sparse.pairs

    def of_sums(coefficients: Tensor, vectors: Tensor) -> Tensor:
        lengths = norm(vectors, dim=1)[pairs.tokens]
        return norm(sums(pairs, coefficients.flatten()[pairs.order].abs_().mul_(lengths)))

    W_enc, W_dec = of_sums(sparse.pre_grad, sparse.centred), of_sums(sparse.top_acts, sparse.recon_grad)
    if sparse.extra is not None:
        W_enc, W_dec = W_enc + norm(sparse.extra.W_enc), W_dec + norm(sparse.extra.W_dec)
    # dropping the part along unit rows only shortens it; the factor is for rounding
    return 1.001 * norm(torch.cat([torch.stack([W_enc, W_dec]), biases]))


def _gradient_blocks(layer: Layer, sparse: SparseGrads, adam: AdamSettings) -> Iterator[_Block]:
    """The gradient of the two matrices, some rows at a time."""
    n_features, width = layer.W_enc.shape
    pairs, rows = sparse.pairs, max(1, _BLOCK_BYTES // (4 * width))
    tokens = pairs.tokens.to(torch.int32)
    acts, pre = (values.flatten()[pairs.order] for values in (sparse.top_acts, sparse.pre_grad))
    extra = _extra_by_block(sparse.extra, rows, n_features)
    edges = [*range(0, n_features, rows), n_features]
    ends = pairs.starts[edges].tolist()
    for index, (start, stop, low, high) in enumerate(zip(edges[:-1], edges[1:], ends[:-1], ends[1:], strict=True)):
        bags = (pairs.starts[start : stop + 1] - low).to(torch.int32)
        W_enc = weighted_bags(tokens[low:high], bags, pre[low:high], sparse.centred)
        W_dec = weighted_bags(tokens[low:high], bags, acts[low:high], sparse.recon_grad)
        if extra is not None and len(extra[index].rows):
            W_enc.index_add_(0, extra[index].rows, extra[index].W_enc)
            W_dec.index_add_(0, extra[index].rows, extra[index].W_dec)
        if adam.unit_norm:
            directions = layer.W_dec[start:stop]
            W_dec.addcmul_(torch.linalg.vecdot(W_dec, directions)[:, None], directions, value=-1)
        yield _Block(slice(start, stop), W_enc, W_dec)


def _extra_by_block(extra: RowGrads | None, rows: int, n_features: int) -> list[RowGrads] | None:
    """``extra`` cut at the edges of the blocks, its rows counted from the block's first."""
    if extra is None:
        return None
    order = extra.rows.argsort()
    edges = torch.arange(0, n_features + rows, rows)
    cuts = torch.searchsorted(extra.rows[order], edges).tolist()
    chosen = [order[low:high] for low, high in itertools.pairwise(cuts)]
    return [RowGrads(extra.rows[at] % rows, extra.W_enc[at], extra.W_dec[at]) for at in chosen]


def _update(
    weights: tuple[Tensor, ...],
    means: tuple[Tensor, ...],
    squares: tuple[Tensor, ...],
    grads: tuple[Tensor, ...],
    scale: Tensor | None,
    adam: AdamSettings,
) -> None:
    """torch's fused Adam on these tensors, in place."""
    if scale is not None:
        grads = tuple(grad * scale for grad in grads)
    # the kernel behind torch.optim.Adam(fused=True), which has no form for a part of a parameter
    torch._fused_adam_(
        list(weights),
        list(grads),
        list(means),
        list(squares),
        [],
        [torch.tensor(float(adam.step))] * len(weights),
        lr=adam.lr,
        beta1=adam.betas[0],
        beta2=adam.betas[1],
        weight_decay=0.0,
        eps=adam.eps,
        amsgrad=False,
        maximize=False,
    )


def _rows(layer: Layer, features: slice) -> tuple[Tensor, Tensor]:
    return layer.W_enc[features], layer.W_dec[features]


def _norms(block: _Block) -> Tensor:
    return torch.stack([torch.linalg.vector_norm(block.W_enc), torch.linalg.vector_norm(block.W_dec)])


def _total_norm(norms: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.cat(norms))
