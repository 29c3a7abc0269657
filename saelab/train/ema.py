"""A running mean of the weights: without the noise of single steps it may reconstruct better than the last ones."""

from __future__ import annotations

import torch
from torch import Tensor

from saelab.sae.base import SAE


class WeightAverage:
    """Exponential moving average of the parameters of ``sae``, in float32.

    mean <- mean + (1 - d) (weights - mean) with d = min(``decay``, (1 + n) / (10 + n)) at the n-th update: a short
    training is not held back by its random start. Source: OpenAI's SAEs (Gao et al. 2024, arXiv 2406.04093) decay by
    0.999; the ramp is that of TensorFlow's ``ExponentialMovingAverage(num_updates)``.
    """

    def __init__(self, sae: SAE, *, decay: float) -> None:
        self.decay = decay
        self.n_updates = 0
        self.means = {name: parameter.detach().float().clone() for name, parameter in sae.named_parameters()}

    @torch.no_grad()
    def update(self, sae: SAE) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        for name, parameter in sae.named_parameters():
            self.means[name].lerp_(parameter.float(), 1 - decay)
        self.n_updates += 1

    @torch.no_grad()
    def put_into_(self, sae: SAE) -> None:
        """Make the means the weights of ``sae``. Means of unit rows are a little shorter, so rows of W_dec are scaled
        to norm 1 again; buffers, such as the running mean of BatchTopK's threshold, stay."""
        for name, parameter in sae.named_parameters():
            parameter.copy_(self.means[name])
        sae.normalise_decoder_()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {**self.means, "n_updates": torch.tensor(self.n_updates)}

    def restore_(self, tensors: dict[str, Tensor]) -> None:
        """Put back what ``tensors`` gave."""
        self.n_updates = int(tensors["n_updates"])
        self.means = {name: tensors[name] for name in self.means}
