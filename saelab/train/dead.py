"""Which features have gone silent: the ones that the auxiliary loss is asked to revive."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class DeadFeatures:
    """Counts, for each feature, the training tokens since it last fired."""

    def __init__(self, d_sae: int, *, window_tokens: int) -> None:
        self.window_tokens = window_tokens
        self.silent_tokens: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64)

    def update(self, fired: Bool[Tensor, " d_sae"], *, n_tokens: int) -> None:
        """Take note of a batch of ``n_tokens`` in which the features of ``fired`` were active."""
        self.silent_tokens += n_tokens
        self.silent_tokens[fired.cpu()] = 0

    @property
    def mask(self) -> Bool[Tensor, " d_sae"]:
        """True for each feature that has been silent for longer than the window."""
        return self.silent_tokens > self.window_tokens
