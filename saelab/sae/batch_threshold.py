"""What stands in for the batch at inference: a threshold, the running mean of the smallest activation training kept.

An SAE with such a threshold has two buffers: ``threshold``, a scalar, and ``n_updates``, how many batches made it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import ConfigError
from saelab.sae.base import SAE
from saelab.sae.jumprelu import JumpReLU, JumpReLUConfig


def check_momentum(threshold_momentum: float) -> None:
    """Raise ConfigError unless the share of the threshold that stays at each step is at least 0 and below 1."""
    if not 0 <= threshold_momentum < 1:
        raise ConfigError(
            f"threshold_momentum must be at least 0 and below 1, got {threshold_momentum}; the usual value is 0.99"
        )


@torch.no_grad()
def update_threshold_(
    threshold: Float[Tensor, ""], n_updates: Int[Tensor, ""], kept: Float[Tensor, " kept"], *, momentum: float
) -> None:
    """Let the smallest of ``kept`` into the running mean; the first batch sets it, a batch without any leaves it."""
    if len(kept) and torch.isfinite(smallest := kept.min()):
        threshold.lerp_(smallest.to(threshold.dtype), 1 - (momentum if n_updates else 0.0))
        n_updates += 1


@torch.no_grad()
def jumprelu_twin(sae: SAE, threshold: Float[Tensor, ""]) -> JumpReLU:
    """The JumpReLU SAE with the weights of ``sae`` and this threshold for each feature."""
    twin = JumpReLU(JumpReLUConfig(d_sae=sae.d_sae), sae.d_in).to(sae.device, sae.dtype)
    for name in ("encoder", "W_dec", "b_enc", "b_dec"):
        getattr(twin, name).copy_(getattr(sae, name))
    twin.threshold.copy_(threshold.expand(sae.d_sae))
    twin.metadata = sae.metadata
    return twin
