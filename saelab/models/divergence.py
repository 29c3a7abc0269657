"""How far apart two next-token distributions are."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def kl_divergence(
    logps: Float[Tensor, "*#batch d_vocab"], others: Float[Tensor, "*#batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p || q) in nats along the last dimension, from log-probabilities of p (``logps``) and q (``others``)."""
    return (logps.exp() * (logps - others)).sum(-1)
