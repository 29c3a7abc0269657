"""Sparse activations with a different number of active features for each token, as thresholds give."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """P active (token, feature) pairs by token, then by feature; token n owns ``offsets[n]:offsets[n + 1]``."""

    acts: Tensor  # float32 or wider [P]
    features: Tensor  # int64 [P], ascending within a token
    offsets: Tensor  # int64 [N+1]

    @property
    def tokens(self) -> Tensor:
        """The token of each pair, int64 [P]."""
        counts = self.offsets.diff()
        index = torch.arange(len(counts), device=counts.device)
        return torch.repeat_interleave(index, counts, output_size=len(self.features))
