"""What stands in for the batch at inference: a threshold, the running mean of the smallest activation training kept.

An SAE with such a threshold has two buffers: ``threshold``, a scalar, and ``n_updates``, how many batches made it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saelab.errors import ConfigError
from saelab.sae.base import SAE, SAEConfig
from saelab.sae.jumprelu import JumpReLU, JumpReLUConfig, jump_relu
from saelab.sae.spread import largest_of_batch, smallest_kept
from saelab_kernels import Ragged


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


class BatchThreshold(SAE):
    """An SAE whose features all have this one threshold: ``encode`` always uses it, training keeps the largest of its
    batch and updates it."""

    threshold: Float[Tensor, ""]
    n_updates: Tensor

    def __init__(self, cfg: SAEConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator=generator)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def fold_(self, mean: Float[Tensor, "*slots d_in"], scale: float | Float[Tensor, " slots"]) -> None:
        """As every SAE; the threshold is in units of the activations."""
        super().fold_(mean, scale)
        self.threshold.div_(scale)

    @torch.no_grad()
    def as_jumprelu(self) -> JumpReLU:
        """The SAE that it is at inference."""
        twin = JumpReLU(JumpReLUConfig(d_sae=self.d_sae), self.d_in).to(self.device, self.dtype)
        for name in ("encoder", "W_dec", "b_enc", "b_dec"):
            getattr(twin, name).copy_(getattr(self, name))
        twin.threshold.copy_(self.threshold.expand(self.d_sae))
        twin.metadata = self.metadata
        return twin

    def activation_floor(self) -> Float[Tensor, " d_sae"]:
        """The one threshold of all features, 0 where it is negative."""
        return self.threshold.clamp_min(0).expand(self.d_sae)

    def _activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return jump_relu(pre_acts, self.threshold)

    def _largest(self, centred: Float[Tensor, "batch d_in"]) -> Ragged:
        """What the batch keeps, k for each token on average; updates the threshold."""
        n_kept = self.cfg.k * len(centred) * self.tokens.size  # type: ignore[attr-defined]
        active = largest_of_batch(centred, self.encoder, self.b_enc, n_kept, self.tokens)
        self._update_threshold(smallest_kept(active.acts.detach(), self.tokens))
        return active

    def _update_threshold(self, kept: Float[Tensor, " kept"]) -> None:
        momentum = self.cfg.threshold_momentum  # type: ignore[attr-defined]
        update_threshold_(self.threshold, self.n_updates, kept, momentum=momentum)
