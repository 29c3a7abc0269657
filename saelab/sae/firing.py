"""ReLU autoencoding of a training batch over pairs or dense, so that a penalty is written once for both."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saelab.sae.affine import PreActs, few_above
from saelab.sae.base import SAE
from saelab_kernels import encode_above, ragged_decode


class Firing(NamedTuple):
    """Activations of a batch: those of its active pairs, or all."""

    recon: Float[Tensor, "batch d_out"]
    acts: Float[Tensor, " pairs"] | Float[Tensor, "batch d_sae"]
    features: Int[Tensor, " pairs"] | None  # None where acts are dense
    fired: Bool[Tensor, " d_sae"]
    l0: Float[Tensor, ""]

    def at_acts(self, values: Float[Tensor, " d_sae"]) -> Float[Tensor, " pairs"] | Float[Tensor, " d_sae"]:
        """``values`` of features, in a shape that broadcasts against ``acts``."""
        return values if self.features is None else values.index_select(0, self.features)


def autoencode_relu(sae: SAE, acts: Float[Tensor, "batch d_in"]) -> Firing:
    """``f = relu((acts - b_dec) @ W_enc + b_enc)`` and ``recon = f @ W_dec + b_dec``; ``acts`` get no gradient."""
    floor = torch.zeros_like(sae.b_enc)
    if few_above(acts - sae.b_dec, sae.encoder, sae.b_enc, floor):
        active = encode_above(acts - sae.b_dec, sae.encoder, sae.b_enc, floor)
        recon = ragged_decode(active, sae.W_dec, sae.b_dec)
        return Firing(recon, active.acts, active.features, *counts(active.acts, active.features, sae, len(acts)))
    feature_acts = PreActs.apply(acts, sae.encoder, sae.b_enc, sae.b_dec).relu_()
    recon = torch.addmm(sae.b_dec, feature_acts, sae.W_dec)
    return Firing(recon, feature_acts, None, *counts(feature_acts, None, sae, len(acts)))


class Counts(NamedTuple):
    fired: Bool[Tensor, " d_sae"]
    l0: Float[Tensor, ""]


@torch.no_grad()
def counts(acts: Tensor, features: Int[Tensor, " pairs"] | None, sae: SAE, n_tokens: int) -> Counts:
    """Which features fired, and active features per token. NaN counts as active."""
    active = acts != 0
    per_feature = active.sum(0) if features is None else torch.bincount(features[active], minlength=sae.d_sae)
    return Counts(per_feature > 0, per_feature.sum().to(sae.dtype) / n_tokens)
