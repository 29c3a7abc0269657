"""The Matryoshka BatchTopK autoencoder: every prefix of the dictionary reconstructs the input by itself.

    L(x) = sum over prefixes m of w_m |x - (f[:m] W_dec[:m] + b_dec)|^2 + AuxK        (Bussmann et al. 2025, 2503.17547)

f is chosen once, as in BatchTopK, and the losses add up (here with weights of sum 1). General features move into the
short prefixes, because longer ones cannot take their place there: less absorption at a small cost in reconstruction.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.errors import ConfigError
from saelab.sae.auxk import auxk_term, check_settings
from saelab.sae.base import SAELoss, TrainingGradient
from saelab.sae.batch_threshold import BatchThreshold, check_momentum
from saelab.sae.gradient import with_auxk
from saelab_kernels import (
    Gradient,
    Ragged,
    SparseGrads,
    encode_batchtopk,
    feature_sum,
    ragged_decode,
    ragged_dot,
    ragged_pairs,
)

#: Exponent of the distribution of random prefix lengths.
_PARETO = 0.5


@dataclass(frozen=True, kw_only=True)
class MatryoshkaConfig:
    arch: ClassVar[str] = "matryoshka"

    d_sae: int
    """Number of features."""
    k: int = 32
    """Features kept for each token, on average over a batch."""
    group_shares: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
    """Sizes of the groups that follow each other in the dictionary, as shares of d_sae; what remains is the last group.
    A prefix ends with each group."""
    prefix_weights: tuple[float, ...] | None = None
    """Weight of each prefix in the loss, the whole dictionary last; only their ratios count. Off: equal."""
    random_prefixes: int | None = None
    """Instead of the groups, so many prefixes whose lengths are drawn anew for each batch, the whole dictionary among
    them: length m with a probability that falls as m^-1.5."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss that revives dead features; 0 turns it off."""
    k_aux: int | None = None
    """Dead features used for each token in the auxiliary loss. Off: half the width of the input."""
    threshold_momentum: float = 0.99
    """How much of the inference threshold stays at each step; the rest comes from the step's batch."""

    def __post_init__(self) -> None:
        check_settings(d_sae=self.d_sae, k=self.k, aux_coefficient=self.aux_coefficient, k_aux=self.k_aux)
        check_momentum(self.threshold_momentum)
        shares = list(self.group_shares)
        if not all(share > 0 for share in shares) or not sum(shares) < 1:
            raise ConfigError(f"group_shares must be positive and sum to less than 1, got {shares}; lower them")
        ends = self.group_ends
        if any(low >= high for low, high in itertools.pairwise(ends)):
            raise ConfigError(f"d_sae={self.d_sae} is too small for {len(ends)} groups; raise it or lower group_shares")
        if self.random_prefixes is not None and not 1 <= self.random_prefixes <= self.d_sae:
            raise ConfigError(f"random_prefixes must be between 1 and d_sae={self.d_sae}, got {self.random_prefixes}")
        if self.prefix_weights is not None:
            self._check_weights(self.prefix_weights)

    def _check_weights(self, weights: tuple[float, ...]) -> None:
        n_prefixes = self.random_prefixes or len(self.group_ends)
        if len(weights) != n_prefixes or not all(weight >= 0 for weight in weights) or not weights[-1] > 0:
            raise ConfigError(
                f"prefix_weights needs {n_prefixes} numbers from 0, the last above 0, got {list(weights)}; "
                "leave it out for equal weights"
            )

    @property
    def group_ends(self) -> tuple[int, ...]:
        """Where the groups end: ascending feature numbers, d_sae the last. Each group has at least one feature."""
        sizes = [max(1, round(share * self.d_sae)) for share in self.group_shares]
        return (*itertools.accumulate(sizes), self.d_sae)

    def prefix_ends(self, progress: float) -> tuple[int, ...]:
        """Lengths of the prefixes of a batch, ascending, d_sae the last; ``progress`` decides the random ones."""
        if self.random_prefixes is None:
            return self.group_ends
        return random_prefix_ends(self.d_sae, self.random_prefixes, seed=repr(progress))


class Matryoshka(BatchThreshold):
    """``encode`` always uses the threshold; ``training_loss`` keeps the largest of its batch and updates it."""

    cfg: MatryoshkaConfig

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Weighted mean of the prefixes' squared errors divided by d_in, plus AuxK for ``dead`` on what the whole
        dictionary leaves over; updates the threshold."""
        acts = self._checked(acts)
        active = self._largest(acts - self.b_dec)
        by_group = grouped(active, self.cfg.prefix_ends(progress))
        added = ragged_decode(by_group, self.W_dec).view(len(acts), -1, self.d_out)
        errors = added.cumsum(1) + self.b_dec - acts[:, None]
        each = torch.stack([error.pow(2).mean() for error in errors.unbind(1)])
        reconstruction = (each * self._weights(each)).sum()
        aux = auxk_term(self, acts, -errors[:, -1], dead)
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=acts.device)
        fired[active.features] = True
        return SAELoss(
            total=reconstruction + aux,
            reconstruction=reconstruction.detach(),
            sparsity=torch.zeros_like(reconstruction.detach()),
            aux=aux.detach(),
            fired=fired,
            l0=acts.new_tensor(len(active.features) / len(acts)),
        )

    @torch.no_grad()
    def training_gradient(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> TrainingGradient:
        """``training_loss`` and its gradient; updates the threshold as well.

        A feature takes part in the prefixes that reach beyond it, so its gradients see one vector of a token: with e_p
        the error of prefix p, that of group p is the sum of w_q e_q over q >= p.
        """
        acts, layer = self._checked(acts), self.layer
        centred = acts - layer.b_dec
        active = encode_batchtopk(centred, layer.W_enc, layer.b_enc, self.cfg.k)
        self._update_threshold(active.acts)
        by_group = grouped(active, self.cfg.prefix_ends(progress))
        errors = ragged_decode(by_group, layer.W_dec).view(len(acts), -1, self.d_out)
        n_prefixes = errors.shape[1]
        errors[:, 0] += layer.b_dec
        errors[:, 0] -= acts
        for p in range(1, n_prefixes):
            errors[:, p] += errors[:, p - 1]
        each = torch.stack([error.pow(2).mean() for error in errors.unbind(1)])
        weights = self._weights(each)
        whole = errors[:, -1].clone()
        errors *= weights[:, None]
        for p in reversed(range(n_prefixes - 1)):
            errors[:, p] += errors[:, p + 1]
        scale = 2 / acts.numel()  # of the mean
        recon_grad = errors.flatten(0, 1)
        pre_grad = ragged_dot(recon_grad, layer.W_dec, by_group).mul_(scale)
        pairs = ragged_pairs(by_group, self.d_sae)
        b_enc = feature_sum(pairs, pre_grad)
        b_dec = errors[:, 0].sum(0).mul_(scale) - b_enc @ layer.W_enc
        sparse = SparseGrads(pairs, active.acts * scale, pre_grad, recon_grad, centred, b_enc, b_dec)
        gradient = Gradient((each * weights).sum(), whole, active.acts, active.features, sparse)
        result = with_auxk(self, gradient, dead)
        # the pairs count a token's row once for each group, in the encoder's gradient as in the decoder's
        centred = centred.repeat_interleave(n_prefixes, 0, output_size=len(recon_grad))
        return result._replace(sparse=result.sparse._replace(centred=centred))

    def _weights(self, losses: Float[Tensor, " prefixes"]) -> Float[Tensor, " prefixes"]:
        """The weights of the prefixes in the precision of their losses; their sum is 1."""
        weights = losses.new_tensor(self.cfg.prefix_weights or [1.0] * len(losses))
        return weights / weights.sum()


def grouped(active: Ragged, ends: tuple[int, ...]) -> Ragged:
    """``active`` with one row for each token and group of features: row token * n_groups + group; the last of a group
    is the feature before one of ``ends`` (ascending, d_sae the last).

    Features ascend within a token, so those of a group are neighbours already, and decoding all groups costs as much as
    decoding once; a prefix adds its last group to the prefix before it.
    """
    group = torch.bucketize(active.features, torch.tensor(ends, device=active.features.device), right=True)
    rows = torch.arange((len(active.offsets) - 1) * len(ends) + 1, device=group.device)
    return active._replace(offsets=torch.searchsorted(active.tokens * len(ends) + group, rows))


def random_prefix_ends(d_sae: int, n_prefixes: int, *, seed: str) -> tuple[int, ...]:
    """``n_prefixes`` different lengths, ascending: d_sae and draws from a Pareto distribution cut off there.

    P(m) = (m^-a - (m + 1)^-a) / (1 - d_sae^-a) with a = 0.5, for m from 1 to d_sae - 1, without replacement: whole
    numbers below draws of density a x^(-1-a), by the inverse of its distribution function. Nabeshima 2024, "Matryoshka
    Sparse Autoencoders" (LessWrong).
    """
    draw, lengths = random.Random(seed), {d_sae}
    while len(lengths) < n_prefixes:
        tail = 1 - draw.random() * (1 - d_sae**-_PARETO)
        lengths.add(min(int(tail ** (-1 / _PARETO)), d_sae - 1))
    return tuple(sorted(lengths))
