"""A batch in two halves, for a step that does not fit into memory: the gradient of the whole, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.sae.base import SAE, SAEConfig, SAELoss
from saelab.train.l0 import selection_of

#: Losses that are a mean over tokens, so that halves average to the whole.
_MEANS = frozenset({"relu", "gated", "matching_pursuit"})
#: The same, but for the auxiliary loss, which is a quotient of two sums over tokens.
_MEANS_BUT_AUX = frozenset({"topk", "abstopk"})


def can_be_halved(cfg: SAEConfig) -> bool:
    """Whether the loss of a batch can be computed from its halves.

    Not where a batch decides together which of its activations stay (BatchTopK and its family): halves would keep other
    ones, which is training of another kind and not a smaller step. Nor where the loss bends a mean of the batch: its L0
    (JumpReLU's quadratic penalty) or its penalty (p-annealing).
    """
    if cfg.arch == "jumprelu":
        return getattr(cfg, "target_l0", None) is None
    return cfg.arch in _MEANS | _MEANS_BUT_AUX or selection_of(cfg) in ("relu", "l1")


def backward_in_halves(
    sae: SAE, acts: Float[Tensor, "batch *slots d_in"], *, dead: Bool[Tensor, " d_sae"] | None, progress: float
) -> SAELoss:
    """Add the gradient of ``training_loss`` of ``acts`` to the parameters, one half of the batch at a time.

    The auxiliary loss of a whole batch is sum(N_i) / sum(D_i), with N_i the squared error that dead features leave in
    half i and D the variance of the residual; of half i by itself it is N_i / D_i. So it enters with weight D_i / D,
    where D is about the mean of the whole batch.
    """
    halves = [half for half in acts.chunk(2) if len(half)]
    shares = [len(half) / len(acts) for half in halves]
    revive = sae.cfg.arch in _MEANS_BUT_AUX and dead is not None and bool(dead.any())
    aux_shares = _residual_shares(sae, halves) if revive else shares
    parts = []
    for half, share, aux_share in zip(halves, shares, aux_shares, strict=True):
        losses = sae.training_loss(half, dead=None if revive else dead, progress=progress)
        (share * losses.total).backward()
        if revive:
            with_aux = sae.training_loss(half, dead=dead, progress=progress)
            without = sae.training_loss(half, dead=None, progress=progress)
            (aux_share * (with_aux.total - without.total)).backward()
            losses = losses._replace(aux=with_aux.aux)
        parts.append(losses)

    def mean(name: str, weights: Sequence[float]) -> Tensor:
        return torch.stack([w * getattr(part, name).detach() for w, part in zip(weights, parts, strict=True)]).sum()

    aux = mean("aux", aux_shares)
    return SAELoss(
        total=mean("total", shares) + (aux if revive else 0.0),
        reconstruction=mean("reconstruction", shares),
        sparsity=mean("sparsity", shares),
        aux=aux,
        fired=torch.stack([part.fired for part in parts]).any(0),
        l0=mean("l0", shares),
    )


@torch.no_grad()
def _residual_shares(sae: SAE, halves: Sequence[Float[Tensor, "_ d_in"]]) -> list[float]:
    """Each half's own residual variance as a share of that of the whole batch."""
    residuals = [half - sae(half) for half in halves]
    whole = torch.cat(residuals)
    total = (whole - whole.mean(0)).square().sum()
    return [float((part - part.mean(0)).square().sum() / total) for part in residuals]
