"""AuxK by hand: five dense products on the packed dead rows, each other pass in place. For every device.

The first product decides which features take part and is float32. The other four are in bfloat16 where the device has
instructions for it, a third of the time: the gradient, which counts for 1/32 in training, is then good to 0.3 %.

    A = the k_aux largest of centred @ W_enc.T + b_enc, the rest and what is negative 0     [N, n_dead]
    E = A @ W_dec - residual                                                                [N, d]
    loss = |E|^2 / variance
    dL/dW_dec = s A.T @ E,   dL/dW_enc = s P.T @ centred,   dL/db_enc = s sum_n P[n]
    with P = (E @ W_dec.T) where A > 0,   s = 2 / variance, which multiplies the small results

A Triton kernel has nothing to add: with k_aux = d / 2 or more active features a token, gathered rows are 43 GB at
N = 8192, k_aux = 1152, d = 2304 in bfloat16, while the packed products are what a GPU and a CPU are fastest at.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saelab_kernels import dispatch


class Dictionary(NamedTuple):
    """The dead features: copies of their rows."""

    W_enc: Tensor  # [n_dead, d]
    b_enc: Tensor  # [n_dead]
    W_dec: Tensor  # [n_dead, d]


class Revival(NamedTuple):
    """What the dead features make of the residual."""

    loss: Tensor  # scalar
    acts: Tensor  # A [N, n_dead], in the products' dtype
    error: Tensor  # E [N, d]
    variance: Tensor  # scalar, above 0


def revive(dead: Dictionary, residual: Tensor, centred: Tensor, k_aux: int) -> Revival:
    """residual and centred [N, d], of the dtype of ``dead``."""
    low = _product_dtype(residual)
    acts = torch.addmm(dead.b_enc, centred, dead.W_enc.T)
    keep_largest_(acts, k_aux)
    acts = acts.to(low)
    error = (acts @ dead.W_dec.to(low)).to(residual.dtype).sub_(residual)
    spread = (residual - residual.mean(0)).reshape(-1)
    variance = torch.dot(spread, spread).clamp_min(torch.finfo(spread.dtype).tiny)
    return Revival(torch.dot(error.reshape(-1), error.reshape(-1)) / variance, acts, error, variance)


def gradients(dead: Dictionary, revival: Revival, centred: Tensor) -> Dictionary:
    """Gradient of the loss."""
    scale = 2 / revival.variance
    dtype, low = dead.W_enc.dtype, revival.acts.dtype
    error = revival.error.to(low)
    pre_grad = error @ dead.W_dec.to(low).T
    pre_grad = torch.ops.aten.threshold_backward(pre_grad, revival.acts, 0)  # the gradient of a ReLU, in one pass
    return Dictionary(
        W_enc=(pre_grad.T @ centred.to(low)).to(dtype).mul_(scale),
        b_enc=pre_grad.sum(0, dtype=dtype).mul_(scale),
        W_dec=(revival.acts.T @ error).to(dtype).mul_(scale),
    )


def _product_dtype(residual: Tensor) -> torch.dtype:
    if residual.dtype == torch.float32 and dispatch.bfloat16_units(residual.device):
        return torch.bfloat16
    return residual.dtype


def keep_largest_(acts: Tensor, k: int) -> None:
    """Set all but the k largest entries of each row of ``acts`` [N, n], and all negative ones, to 0. NaN stays.

    Of equal values at the border those at the lower indices stay.
    """
    if k >= acts.shape[1]:
        acts.relu_()
        return
    floor = _kth_largest(acts, k).clamp_min_(0)[:, None]
    acts.masked_fill_(acts < floor, 0)
    surplus = (acts > 0).sum(1, keepdim=True) - k
    if acts.device.type != "cpu" or (surplus > 0).any():  # rare; where looking would stall, it is not asked
        tied = (acts == floor) & (floor > 0)
        place = tied.cumsum(1)
        acts.masked_fill_(tied & (place > place[:, -1:] - surplus.clamp_min(0)), 0)


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """[N]; NaN counts as the largest."""
    if values.device.type != "cpu":
        return values.topk(k, dim=1, sorted=False).values.amin(1)
    # numpy partitions with vector instructions: 4 ms for [1024, 819] and k = 384, torch.topk 10, torch.kthvalue 20
    place = values.shape[1] - k
    return torch.from_numpy(np.partition(values.numpy(), place, axis=1)[:, place])
