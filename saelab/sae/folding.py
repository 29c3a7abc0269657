"""Folding the normalisation of the input into weights, for architectures whose biases are others than b_enc."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.sae.base import SAE


@torch.no_grad()
def fold_input_(
    sae: SAE, biases: Sequence[str], mean: Float[Tensor, "*slots d_in"], scale: float | Float[Tensor, " slots"]
) -> None:
    """Make ``sae``, trained on ``scale * (acts - mean)``, work on ``acts``; ``biases`` are in units of pre-activations.

    Raises:
        ConfigError: ``scale`` is not a positive number.
    """
    assert isinstance(scale, float)  # an architecture with slots folds each by itself
    if not 0 < scale < float("inf"):
        raise ConfigError(f"the scale to fold must be a positive number, got {scale}; was it estimated on zeros?")
    # through float64, so that each weight is rounded once
    for name in biases:
        bias = sae.get_parameter(name)
        bias.copy_(bias.double() / scale)
    sae.b_dec.copy_(mean.double() + sae.b_dec.double() / scale)
