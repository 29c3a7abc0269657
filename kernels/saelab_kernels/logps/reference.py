"""Definition of the log-probabilities of given tokens, with all N x V logits; torch differentiates it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_logps(hidden: Tensor, W_U: Tensor, targets: Tensor) -> Tensor:
    """hidden [N, d], W_U [V, d], targets int64 [N] -> log softmax(hidden @ W_U.T) at the targets, [N], in nats."""
    return F.log_softmax(F.linear(hidden, W_U), dim=1).gather(1, targets[:, None])[:, 0]
