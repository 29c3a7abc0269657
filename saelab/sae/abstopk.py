"""The AbsTopK autoencoder: each token keeps its k pre-activations of largest magnitude, with their sign (2510.00404).

    z = (x - b_dec) W_enc + b_enc      f = z where |z| is among the token's k largest, else 0    recon = f W_dec + b_dec

A feature then has two directions, and an activation below 0 means the opposite of the feature. It is a TopK
autoencoder over the mirrored dictionary, in which each feature is followed by its negative: of z and -z one at most is
positive, and relu(z) W_dec + relu(-z) (-W_dec) = z W_dec. So it has TopK's kernels and guarantees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.sae.auxk import check_settings, n_revived, revival_loss
from saelab.sae.base import SAELoss, SparseActs
from saelab.sae.token_top import TokenTop
from saelab_kernels import Autoencoded, autoencode_topk, encode_topk


@dataclass(frozen=True, kw_only=True)
class AbsTopKConfig:
    arch: ClassVar[str] = "abstopk"

    d_sae: int
    """Number of features."""
    k: int = 32
    """Features kept for each token."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss that revives dead features; 0 turns it off."""
    k_aux: int | None = None
    """Dead features used for each token in the auxiliary loss. Off: half the width of the input."""

    def __post_init__(self) -> None:
        check_settings(d_sae=self.d_sae, k=self.k, aux_coefficient=self.aux_coefficient, k_aux=self.k_aux)


class Mirrored(NamedTuple):
    """A dictionary of 2 d_sae features: number 2i is feature i, number 2i + 1 its negative."""

    encoder: Float[Tensor, "two_d_sae d_in"]
    b_enc: Float[Tensor, " two_d_sae"]
    W_dec: Float[Tensor, "two_d_sae d_out"]


class AbsTopK(TokenTop):
    cfg: AbsTopKConfig

    def __init__(self, cfg: AbsTopKConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator=generator)

    def encode_sparse(self, acts: Float[Tensor, "batch d_in"]) -> SparseActs:
        """The k features of each token, signed, largest magnitude first."""
        mirrored = self._mirrored()
        top = encode_topk(self._checked(acts) - self.b_dec, mirrored.encoder, mirrored.b_enc, self.cfg.k)
        return SparseActs(top.top_acts * (1 - 2 * (top.top_indices % 2)), top.top_indices // 2)

    def forward(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction; no dense feature activations are made on the way."""
        flat = self._checked(acts).reshape(-1, self.d_in)
        return self._autoencode(flat, self._mirrored()).recon.view(acts.shape)

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Squared error divided by d_in, plus the auxiliary loss, signed as well, for the features of ``dead``."""
        acts = self._checked(acts)
        mirrored = self._mirrored()
        recon, top_acts, top_indices = self._autoencode(acts, mirrored)
        error = recon - acts
        reconstruction = error.pow(2).mean()
        aux = self.cfg.aux_coefficient * self._revival(acts, -error, dead, mirrored)
        active = top_acts.detach() != 0
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=acts.device)
        fired[top_indices[active] // 2] = True
        return SAELoss(
            total=reconstruction + aux,
            reconstruction=reconstruction.detach(),
            sparsity=torch.zeros_like(reconstruction.detach()),
            aux=aux.detach(),
            fired=fired,
            l0=active.sum(dtype=acts.dtype) / len(acts),
        )

    def _revival(
        self,
        acts: Float[Tensor, "batch d_in"],
        residual: Float[Tensor, "batch d_out"],
        dead: Bool[Tensor, " d_sae"] | None,
        mirrored: Mirrored,
    ) -> Float[Tensor, ""]:
        if dead is None or not self.cfg.aux_coefficient:
            return acts.new_zeros(())
        return revival_loss(
            mirrored.encoder,
            mirrored.b_enc,
            mirrored.W_dec,
            centred=acts - self.b_dec.detach(),
            residual=residual,
            dead=dead.repeat_interleave(2),
            k_aux=n_revived(self.cfg, self.d_in),
            tokens=self.tokens,
        )

    def _mirrored(self) -> Mirrored:
        def with_negatives(tensor: Float[Tensor, "d_sae ..."]) -> Float[Tensor, "two_d_sae ..."]:
            return torch.stack([tensor, -tensor], dim=1).flatten(0, 1)

        return Mirrored(with_negatives(self.encoder), with_negatives(self.b_enc), with_negatives(self.W_dec))

    def _autoencode(self, acts: Float[Tensor, "batch d_in"], mirrored: Mirrored) -> Autoencoded:
        return autoencode_topk(acts, mirrored.encoder, mirrored.b_enc, mirrored.W_dec, self.b_dec, self.cfg.k)
