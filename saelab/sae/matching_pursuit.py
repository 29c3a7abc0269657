"""The matching pursuit autoencoder: features are taken one after the other, each from what the last ones left over.

Costa et al. 2025, arXiv 2506.03093, algorithm 1. With d_i = row i of W_dec and residual r_0 = x - b_dec:

    i_t = argmax_i d_i . r_t      a_t = ReLU(d_{i_t} . r_t)      r_{t+1} = r_t - a_t d_{i_t}
    recon = b_dec + sum_t a_t d_{i_t} = x - r_T                  loss = |r_T|^2 / d_in

There is no encoder: what reads is what writes. A token stops when its residual is shorter than ``residual_threshold``,
when it takes a feature that it has already, or after ``max_iterations``.

The gradient is that of the unrolled steps with the choices i_t held fixed. Going back from g_T = dL/dr_T, with h_t what
the loss says of a_t itself:

    alpha_t = h_t - g_{t+1} . d      dL/dd = alpha_t r_t - a_t g_{t+1}      g_t = g_{t+1} + alpha_t d

The residuals are made again on the way back (r_t = r_{t+1} + a_t d), so memory does not grow with the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from saelab.errors import ConfigError
from saelab.sae.base import SAE, SAELoss
from saelab_kernels import encode_topk, feature_grad, pairs_by_feature


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitConfig:
    arch: ClassVar[str] = "matching_pursuit"

    d_sae: int
    """Number of features."""
    residual_threshold: float = 1e-2
    """A token stops when the norm of its residual is below this, in units of the activations; 0 turns it off."""
    max_iterations: int | None = 32
    """Steps for each token at most, and so the largest L0. Off: the width of the input."""
    stop_on_duplicate_support: bool = True
    """Whether a token stops once it has taken a feature for the second time (SAELens: True)."""

    def __post_init__(self) -> None:
        if self.d_sae < 1:
            raise ConfigError(f"d_sae must be at least 1, got {self.d_sae}; raise it")
        if not self.residual_threshold >= 0:
            raise ConfigError(f"residual_threshold must not be negative, got {self.residual_threshold}; 0 is off")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ConfigError(f"max_iterations must be at least 1, got {self.max_iterations}; leave it out for d_in")


class MatchingPursuit(SAE):
    """``W_dec`` and ``b_dec`` are all its parameters."""

    cfg: MatchingPursuitConfig
    pre_act_biases = ()

    def __init__(self, cfg: MatchingPursuitConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__(cfg, d_in, generator=generator)
        del self.encoder, self.b_enc

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """The decoder transposed."""
        return self.W_dec.T

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    def forward(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction, in the precision of the SAE."""
        acts = self._checked(acts)
        return acts - self._pursue(acts.reshape(-1, self.d_in)).residual.view(acts.shape)

    def encode(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, dense; what a feature took in several steps is summed.

        Raises:
            ShapeError: ``acts`` has another width than the SAE reads.
        """
        acts = self._checked(acts)
        found = self._pursue(acts.reshape(-1, self.d_in))
        feature_acts = found.values.new_zeros(len(found.values), self.d_sae)
        return feature_acts.scatter_add(1, found.features, found.values).view(*acts.shape[:-1], self.d_sae)

    def pre_acts(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """What the first step chooses from."""
        return (self._checked(acts) - self.b_dec) @ self.W_enc

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Mean square of the last residual; ``dead`` and ``progress`` are not used."""
        acts = self._checked(acts)
        found = self._pursue(acts, by_gram=gram_pays(len(acts), self.d_sae, self.cfg, self.dtype))
        reconstruction = found.residual.pow(2).mean()
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=acts.device)
        fired[found.features[found.is_new]] = True
        zero = torch.zeros_like(reconstruction.detach())
        return SAELoss(
            total=reconstruction,
            reconstruction=reconstruction.detach(),
            sparsity=zero,
            aux=zero,
            fired=fired,
            l0=found.is_new.sum(dtype=acts.dtype) / len(acts),
        )

    @torch.no_grad()
    def fold_(self, mean: Float[Tensor, "*slots d_in"], scale: float | Float[Tensor, " slots"]) -> None:
        """As every SAE; the residual's threshold is in units of the activations.

        Raises:
            ConfigError: ``scale`` is not a positive number.
        """
        super().fold_(mean, scale)
        self.cfg = replace(self.cfg, residual_threshold=self.cfg.residual_threshold / float(scale))

    def _pursue(self, acts: Float[Tensor, "batch d_in"], *, by_gram: bool = False) -> Found:
        return Found(*Pursuit.apply(acts - self.b_dec, self.W_dec, self.cfg, by_gram))


class Found(NamedTuple):
    """What the steps took from each token, in their order; a token that stops takes 0 of feature 0."""

    residual: Float[Tensor, "batch d_in"]
    values: Float[Tensor, "batch steps"]
    features: Int[Tensor, "batch steps"]
    is_new: Bool[Tensor, "batch steps"]  # active, and not taken before


class Pursuit(torch.autograd.Function):
    """The steps for ``centred = acts - b_dec``, differentiable in it and in ``W_dec``."""

    @staticmethod
    def forward(
        ctx: Any,
        centred: Float[Tensor, "batch d_in"],
        W_dec: Float[Tensor, "d_sae d_in"],
        cfg: MatchingPursuitConfig,
        by_gram: bool,
    ) -> tuple[Tensor, ...]:
        found = pursue_by_gram(centred, W_dec, cfg) if by_gram else pursue(centred, W_dec, cfg)
        ctx.save_for_backward(found.residual, found.values, found.features, W_dec)
        ctx.mark_non_differentiable(found.features, found.is_new)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, values_grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        residual, values, features, W_dec = ctx.saved_tensors
        W_dec_grad = torch.zeros_like(W_dec)
        for last in range(values.shape[1] - 1, -1, -_GROUP):
            steps, rows = range(last, max(-1, last - _GROUP), -1), []
            for step in steps:
                taken, direction = values[:, step, None], W_dec[features[:, step]]
                residual = torch.addcmul(residual, taken, direction)
                alpha = values_grad[:, step, None] - torch.linalg.vecdot(grad, direction)[:, None]
                alpha = alpha.masked_fill(taken == 0, 0)  # nothing was taken: stopped, or cut by the ReLU
                rows.append(torch.addcmul(alpha * residual, taken, grad, value=-1))
                grad = torch.addcmul(grad, alpha, direction)
            # several steps at a time: the sum over a feature's pairs writes all of [d_sae, d_in] at each call
            pairs = pairs_by_feature(torch.cat([features[:, step, None] for step in steps]), len(W_dec))
            W_dec_grad += feature_grad(pairs, values.new_ones(len(rows) * len(values)), torch.cat(rows))
        return grad, W_dec_grad, None, None


#: Steps whose gradients are summed together: so many copies of the batch are held for it.
_GROUP = 8


@torch.no_grad()
def pursue(
    centred: Float[Tensor, "batch d_in"], W_dec: Float[Tensor, "d_sae d_in"], cfg: MatchingPursuitConfig
) -> Found:
    """Take features until every token has stopped; those that have are left out of the search. NaN is not hidden.

    The exact search of TopK's encoder with k = 1, so a token's features do not depend on its batch.
    """
    residual, n_tokens = centred.clone(), len(centred)
    running = torch.arange(n_tokens, device=centred.device)
    no_bias = W_dec.new_zeros(len(W_dec))
    steps: list[_Step] = []
    for _ in range(cfg.max_iterations or centred.shape[1]):
        top = encode_topk(residual[running], W_dec, no_bias, 1)
        value, feature = top.top_acts[:, 0], top.top_indices[:, 0]
        residual[running] = torch.addcmul(residual[running], value[:, None], W_dec[feature], value=-1)
        is_new = value != 0
        for earlier in steps:
            is_new &= earlier.feature[running] != feature
        step = _Step(value.new_zeros(n_tokens), feature.new_zeros(n_tokens), is_new.new_zeros(n_tokens))
        for whole, part in zip(step, (value, feature * (value != 0), is_new), strict=True):
            whole[running] = part
        steps.append(step)
        running = running[_goes_on(residual[running], value, is_new, cfg)]
        if not len(running):
            break
    return _found(residual, steps)


@torch.no_grad()
def pursue_by_gram(
    centred: Float[Tensor, "batch d_in"], W_dec: Float[Tensor, "d_sae d_in"], cfg: MatchingPursuitConfig
) -> Found:
    """The same with all inner products of features at hand, by which projections follow the residual.

        d_i . r_{t+1} = d_i . r_t - a_t (d_i . d_{i_t})

    A step then costs one row of the table for each token instead of a product with the dictionary. Rounding adds up
    over the steps, and of two features that fit equally well to seven digits it may take the other one.
    """
    gram = W_dec @ W_dec.T
    parts = [_by_gram(rows, W_dec, gram, cfg) for rows in centred.split(_ROWS)]
    n_steps = max(part.values.shape[1] for part in parts)
    padded = [
        torch.cat([torch.nn.functional.pad(part[i], (0, n_steps - part[i].shape[1])) for part in parts])
        for i in (1, 2, 3)
    ]
    return Found(torch.cat([part.residual for part in parts]), *padded)


#: Tokens at a time: their projections stay in the cache from one step to the next.
_ROWS = 256

#: The largest table of inner products; 8192 features in float32.
_GRAM_BYTES = 256 * 2**20


def gram_pays(n_tokens: int, d_sae: int, cfg: MatchingPursuitConfig, dtype: torch.dtype) -> bool:
    """Whether the table fits and is made in less time than the steps of this batch save by it."""
    steps = cfg.max_iterations or n_tokens
    return d_sae**2 * dtype.itemsize <= _GRAM_BYTES and 4 * d_sae <= n_tokens * steps


class _Step(NamedTuple):
    value: Float[Tensor, " batch"]
    feature: Int[Tensor, " batch"]
    is_new: Bool[Tensor, " batch"]


def _by_gram(
    centred: Float[Tensor, "rows d_in"],
    W_dec: Float[Tensor, "d_sae d_in"],
    gram: Float[Tensor, "d_sae d_sae"],
    cfg: MatchingPursuitConfig,
) -> Found:
    residual, projections = centred.clone(), centred @ W_dec.T
    running = torch.ones(len(centred), dtype=torch.bool, device=centred.device)
    steps: list[_Step] = []
    for _ in range(cfg.max_iterations or centred.shape[1]):
        feature = projections.argmax(dim=1).masked_fill_(~running, 0)
        direction = W_dec[feature]
        value = torch.linalg.vecdot(residual, direction).relu_().masked_fill_(~running, 0)
        residual.addcmul_(value[:, None], direction, value=-1)
        projections.addcmul_(value[:, None], gram[feature], value=-1)
        is_new = value != 0
        for earlier in steps:
            is_new &= earlier.feature != feature
        steps.append(_Step(value, feature * (value != 0), is_new))
        running = running & _goes_on(residual, value, is_new, cfg)
        if not running.any():
            break
    return _found(residual, steps)


def _goes_on(
    residual: Float[Tensor, "rows d_in"],
    value: Float[Tensor, " rows"],
    is_new: Bool[Tensor, " rows"],
    cfg: MatchingPursuitConfig,
) -> Bool[Tensor, " rows"]:
    goes_on = (torch.linalg.vector_norm(residual, dim=1) >= cfg.residual_threshold) & (value != 0)
    return goes_on & is_new if cfg.stop_on_duplicate_support else goes_on


def _found(residual: Float[Tensor, "batch d_in"], steps: Sequence[_Step]) -> Found:
    return Found(residual, *(torch.stack(column, dim=1) for column in zip(*steps, strict=True)))
