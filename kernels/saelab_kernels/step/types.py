"""What a feature-major training step takes: the weights, their gradient in factors, Adam's settings."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from saelab_kernels.pairs import Pairs


class Layer(NamedTuple):
    """One tensor for each parameter of an autoencoder: the weights, one of Adam's moments, or a gradient."""

    W_enc: Tensor  # [F, d]
    W_dec: Tensor  # [F, d]
    b_enc: Tensor  # [F]
    b_dec: Tensor  # [d]


class RowGrads(NamedTuple):
    """A gradient that is zero but for some features, as AuxK's."""

    rows: Tensor  # int64 [n], each at most once
    W_enc: Tensor  # [n, d]
    W_dec: Tensor  # [n, d]


class SparseGrads(NamedTuple):
    """The gradient of a layer, the two large matrices in the factors that they are made of.

    dL/dW_dec[f] = sum over the pairs (n, j) of f of top_acts[n, j] recon_grad[n], and dL/dW_enc[f] the same sum of
    pre_grad[n, j] centred[n]; both plus the rows of ``extra``.
    """

    pairs: Pairs
    top_acts: Tensor  # one entry for each pair, in the order of top_indices: [N, k], or [P] of a ragged batch
    pre_grad: Tensor  # the same shape
    recon_grad: Tensor  # [N, d]
    centred: Tensor  # [N, d]
    b_enc: Tensor  # [F], whole
    b_dec: Tensor  # [d], whole
    extra: RowGrads | None = None


class AdamSettings(NamedTuple):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) without weight decay, as torch.optim.Adam computes it."""

    lr: float
    step: int
    """1 for the first step: what the moments' bias is corrected by."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float | None = None
    """Scale the gradient down to this norm where it is larger. None: weights change before the norm is known."""
    unit_norm: bool = True
    """Whether rows of W_dec have norm 1: the gradient along them is dropped first and the norm restored after."""
