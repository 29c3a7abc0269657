"""What architectures share that keep k features of each token: the sparse form, and all others from it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.sae.base import SAE, SparseActs, SparseCodes
from saelab_kernels import sparse_decode


class TokenTop(SAE):
    """An architecture defines ``encode_sparse``. Of equal values at the border the lower index stays."""

    def encode_sparse(self, acts: Float[Tensor, "batch d_in"]) -> SparseActs:
        """The k features of each token."""
        raise NotImplementedError

    def encode(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, dense.

        Raises:
            ShapeError: ``acts`` has another width than the SAE reads.
        """
        top = self.encode_sparse(self._checked(acts).reshape(-1, self.d_in))
        feature_acts = top.top_acts.new_zeros(len(top.top_acts), self.d_sae).scatter(1, top.top_indices, top.top_acts)
        return feature_acts.view(*acts.shape[:-1], self.d_sae)

    def decode_sparse(self, top: SparseActs) -> Float[Tensor, "batch d_out"]:
        """The reconstruction from the sparse form."""
        return sparse_decode(top.top_acts, top.top_indices, self.W_dec, self.b_dec)

    @torch.no_grad()
    def sparse_codes(self, acts: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """The active features of each row. NaN counts as active, so that it does not vanish."""
        top = self.encode_sparse(acts)
        features, order = top.top_indices.sort(dim=1)
        values = top.top_acts.gather(1, order)
        active = values != 0
        rows = torch.arange(len(acts), device=acts.device)[:, None].expand_as(features)
        return SparseCodes(rows[active], features[active], values[active])
