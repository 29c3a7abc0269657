"""Log-probabilities of given tokens a tile of the vocabulary at a time, in plain torch: for the CPU, and on any device.

With logits l = hidden @ W_U.T, over tiles of a few thousand columns:

    lse[n] = log sum_v exp l[n, v]       kept as a maximum and a sum scaled by it; the maximum only grows
    logps[n] = l[n, targets[n]] - lse[n]

and backward, with g = dL/dlogps and the tile's logits computed again:

    D[n, v] = g[n] ([v = targets[n]] - exp(l[n, v] - lse[n]))
    dL/dhidden = D @ W_U,    dL/dW_U = D.T @ hidden

Four products instead of the three of a dense softmax, for the memory of one tile instead of N V logits and as many
gradients. The target's 1 is added inside D: where the model is sure of a token, 1 - p is small and must not be rounded
as the difference of two large rows.

Logits of bfloat16 inputs are float32 products. A bfloat16 product rounds them to 8 bits, which for logits of about 20
is an error of 0.1 nats. D however is as good in bfloat16 as the gradients are, so those two products are made in it
where the CPU has the instructions (``dispatch.bfloat16_units``): their last bits may differ between machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saelab_kernels import dispatch

#: Largest tile of logits, 256 tokens x 4096 columns of float32 or 2048 x 512: speed is the same from 1 to 8 MiB.
TILE_BYTES = 2**22
MAX_ROWS = 2048


class Logps(NamedTuple):
    """The log-probabilities of the targets, and what the gradient needs besides."""

    logps: Tensor  # [N]
    logsumexp: Tensor  # [N], over the vocabulary


def token_logps(hidden: Tensor, W_U: Tensor, targets: Tensor) -> Logps:
    """hidden [N, d], W_U [V, d] of one dtype, targets int64 [N] -> float32 or wider. An outside target gives NaN."""
    dtype = _logits_dtype(hidden)
    maximum = torch.full((len(hidden),), -torch.inf, dtype=dtype, device=hidden.device)
    total, at_target = torch.zeros_like(maximum), torch.full_like(maximum, torch.nan)
    buffer = _tile_buffer(hidden, W_U)
    for rows in _parts(len(hidden), MAX_ROWS):
        x = hidden[rows].to(dtype)
        for columns in _parts(len(W_U), buffer.shape[1]):
            logits = _logits(x, W_U[columns], buffer)
            local = targets[rows, None] - columns.start
            found = (local >= 0) & (local < logits.shape[1])
            target = logits.gather(1, local.clamp(0, logits.shape[1] - 1))
            at_target[rows] = torch.where(found, target, at_target[rows, None])[:, 0]
            largest = torch.maximum(maximum[rows], logits.amax(1))
            shift = torch.where(largest == -torch.inf, 0.0, largest)  # -inf - -inf would be NaN, and stay
            total[rows] *= (maximum[rows] - shift).exp()
            total[rows] += logits.sub_(shift[:, None]).exp_().sum(1)
            maximum[rows] = largest
    logsumexp = maximum + total.log()
    return Logps(at_target - logsumexp, logsumexp)


def gradients(
    grad: Tensor, hidden: Tensor, W_U: Tensor, targets: Tensor, logsumexp: Tensor, *, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """dL/dhidden [N, d] and dL/dW_U [V, d], those that are needed, from dL/dlogps ``grad`` [N]."""
    dtype = _logits_dtype(hidden)
    low = _product_dtype(hidden)
    hidden_grad = torch.zeros_like(hidden, dtype=dtype) if need[0] else None
    # one part of rows writes each row of dL/dW_U once, in its own dtype; more of them add up in float32 first
    several = len(hidden) > MAX_ROWS
    W_grad = torch.zeros_like(W_U, dtype=dtype if several else None) if need[1] else None
    buffer = _tile_buffer(hidden, W_U)
    for rows in _parts(len(hidden), MAX_ROWS):
        x = hidden[rows].to(dtype)
        x_low = hidden[rows].to(low)
        for columns in _parts(len(W_U), buffer.shape[1]):
            logits = _logits(x, W_U[columns], buffer)
            delta = _delta(logits, logsumexp[rows], grad[rows], targets[rows] - columns.start).to(low)
            if hidden_grad is not None:
                hidden_grad[rows] += delta @ W_U[columns].to(low)
            if W_grad is not None:
                W_grad[columns] += delta.T @ x_low
    return (
        None if hidden_grad is None else hidden_grad.to(hidden.dtype),
        None if W_grad is None else W_grad.to(W_U.dtype),
    )


def _delta(logits: Tensor, logsumexp: Tensor, grad: Tensor, local: Tensor) -> Tensor:
    """D [n, columns], in the place of the logits; ``local`` [n] are the targets, as columns of the tile."""
    delta = logits.sub_(logsumexp[:, None]).exp_().mul_(-grad[:, None])
    # one entry a row, so that the order of adding is no matter; a row whose target is in another tile adds 0
    inside = (local >= 0) & (local < logits.shape[1])
    places = local.clamp(0, logits.shape[1] - 1)[:, None]
    return delta.scatter_add_(1, places, torch.where(inside, grad, 0.0)[:, None])


def _logits(x: Tensor, W_U: Tensor, buffer: Tensor) -> Tensor:
    """``x @ W_U.T`` [n, columns] in the front of ``buffer``."""
    out = buffer.view(-1)[: len(x) * len(W_U)].view(len(x), len(W_U))
    return torch.mm(x, W_U.to(x.dtype).T, out=out)


def _tile_buffer(hidden: Tensor, W_U: Tensor) -> Tensor:
    """Memory for the logits of one tile, [rows, columns] at the most."""
    dtype = _logits_dtype(hidden)
    rows = min(len(hidden), MAX_ROWS)
    columns = max(1, TILE_BYTES // (dtype.itemsize * max(1, rows)))
    return hidden.new_empty(rows, min(columns, len(W_U)), dtype=dtype)


def _parts(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _logits_dtype(hidden: Tensor) -> torch.dtype:
    return torch.promote_types(hidden.dtype, torch.float32)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the two products with D."""
    if hidden.dtype == torch.bfloat16 and dispatch.bfloat16_units(hidden.device):
        return torch.bfloat16
    return _logits_dtype(hidden)
