"""AuxK: dead features learn to reconstruct what the living ones leave over."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from saelab.dist import Group
from saelab.errors import ConfigError
from saelab.sae.base import SAE, SAEConfig
from saelab.sae.spread import variance_share
from saelab_kernels.revive import aux_loss


def check_settings(*, d_sae: int, k: int, aux_coefficient: float, k_aux: int | None) -> None:
    """What every architecture that keeps k features and revives the others asks of its settings.

    Raises:
        ConfigError: k outside 1..d_sae, a negative coefficient, or fewer than one dead feature a token.
    """
    if not 1 <= k <= d_sae:
        raise ConfigError(f"k must be between 1 and d_sae={d_sae}, got {k}; lower k or raise d_sae")
    if aux_coefficient < 0:
        raise ConfigError(f"aux_coefficient must not be negative, got {aux_coefficient}; usual is 1/32")
    if k_aux is not None and k_aux < 1:
        raise ConfigError(f"k_aux must be at least 1, got {k_aux}; leave it out for d_in / 2")


def n_revived(cfg: SAEConfig, width: int) -> int:
    """Dead features that the auxiliary loss uses for each token; ``width`` is that of what they reconstruct."""
    return cfg.k_aux or max(1, width // 2)  # type: ignore[attr-defined]


def auxk_term(
    sae: SAE,
    acts: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_sae"] | None,
) -> Float[Tensor, ""]:
    """``auxk_loss`` as it enters the training loss: its coefficient included, 0 where that is 0."""
    coefficient = sae.cfg.aux_coefficient  # type: ignore[attr-defined]
    revived = dead if coefficient else None
    return coefficient * auxk_loss(sae, acts, residual, revived, k_aux=n_revived(sae.cfg, sae.d_in))


def auxk_loss(
    sae: SAE,
    acts: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
    dead: Bool[Tensor, " d_sae"] | None,
    *,
    k_aux: int,
) -> Float[Tensor, ""]:
    """Share of the variance of ``residual`` that the ``k_aux`` largest dead features of each token do not explain.

    sum |residual - recon_of_dead|^2 / sum |residual - mean(residual)|^2, after Gao et al. 2024, arXiv 2406.04093, A.2.
    0 when nothing is dead. Its gradient reaches the dead rows alone: all but the weights counts as constant.
    """
    return revival_loss(
        sae.encoder,
        sae.b_enc,
        sae.W_dec,
        centred=acts - sae.b_dec.detach(),
        residual=residual,
        dead=dead,
        k_aux=k_aux,
        tokens=sae.tokens,
    )


def revival_loss(
    encoder: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    *,
    centred: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_out"],
    dead: Bool[Tensor, " d_sae"] | None,
    k_aux: int,
    tokens: Group,
) -> Float[Tensor, ""]:
    """The same for these weights; ``centred`` is what the encoder multiplies, ``tokens`` who hold the batch."""
    rows = dead.nonzero().flatten() if dead is not None else None
    if rows is None or not len(rows):
        return residual.new_zeros(())
    return variance_share(residual.detach(), tokens) * aux_loss(rows, residual, centred, encoder, b_enc, W_dec, k_aux)
