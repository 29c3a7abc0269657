"""The crosscoder: one dictionary for several activations of a token, those of two models or of several layers.

    f = ReLU(sum over slots m of (a_m - b_dec_m) W_enc_m + b_enc),  a_hat_m = f W_dec_m + b_dec_m
    L = sum_m |a_m - a_hat_m|^2 + l1_coefficient sum_j f_j sum_m |W_dec_m,j|      (Lindsey et al. 2024, "Sparse
        Crosscoders for Cross-Layer Features and Model Diffing")

With "batchtopk" there is no penalty: a batch keeps the k for each token that are largest by f_j sum_m |W_dec_m,j|
(Minder et al. 2025, arXiv 2504.02922), which does not reward a feature for leaving one of the slots. ``n_exclusive``
gives each slot features of its own, which neither read nor write the others (Jiralerspong and Bricken 2026, arXiv
2602.11729). The papers do not subtract b_dec from the input; b_enc makes up for the difference. Losses are divided by
n_slots d_in, so all this is an SAE on the slots laid side by side but for the sum of norms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saelab.errors import ConfigError, ShapeError
from saelab.sae.affine import few_above
from saelab.sae.auxk import check_settings, n_revived, revival_loss
from saelab.sae.base import SAE, SAELoss, SparseCodes
from saelab.sae.batch_threshold import check_momentum, update_threshold_
from saelab.sae.jumprelu import jump_relu
from saelab.sae.progress import check_share, warmed_up
from saelab.sae.slots import checked_scales
from saelab.sae.spread import largest_of_batch, smallest_kept
from saelab_kernels import encode_above, ragged_decode

#: Norm of a fresh feature's decoder in each slot where norms are free and half of all features are active at first.
_L1_NORM = 0.1


@dataclass(frozen=True, kw_only=True)
class CrosscoderConfig:
    arch: ClassVar[str] = "crosscoder"

    d_sae: int
    """Number of features."""
    n_slots: int = 2
    """Activations that a token has: models or layers."""
    sparsity: Literal["batchtopk", "l1"] = "batchtopk"
    """Keep the largest of a batch, or penalise the activations."""
    k: int = 32
    """Features kept for each token, on average over a batch (batchtopk)."""
    l1_coefficient: float = 1.0
    """Weight of the penalty against the squared error of a token, summed over slots (l1)."""
    l1_warmup_share: float = 0.05
    """Share of the training over which the penalty rises from 0."""
    n_exclusive: int = 0
    """Features that each slot has to itself; those of slot 0 come first in the dictionary, the shared ones last."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss that revives dead features (batchtopk); 0 turns it off."""
    k_aux: int | None = None
    """Dead features used for each token in the auxiliary loss. Off: half the width of a slot."""
    threshold_momentum: float = 0.99
    """How much of the inference threshold stays at each step (batchtopk)."""

    def __post_init__(self) -> None:
        k = self.k if self.sparsity == "batchtopk" else 1
        check_settings(d_sae=self.d_sae, k=k, aux_coefficient=self.aux_coefficient, k_aux=self.k_aux)
        check_momentum(self.threshold_momentum)
        if self.n_slots < 2:
            raise ConfigError(f"n_slots must be at least 2, got {self.n_slots}; for one, train an SAE")
        if self.l1_coefficient < 0:
            raise ConfigError(f"l1_coefficient must not be negative, got {self.l1_coefficient}; usual is 0.1 to 10")
        check_share("l1_warmup_share", self.l1_warmup_share)
        if not 0 <= self.n_exclusive * self.n_slots <= self.d_sae:
            raise ConfigError(
                f"n_exclusive={self.n_exclusive} for each of {self.n_slots} slots does not fit into "
                f"d_sae={self.d_sae}; lower it"
            )

    def owner(self, feature: int) -> int | None:
        """The slot that has this feature to itself, None for a shared one."""
        return feature // self.n_exclusive if feature < self.n_exclusive * self.n_slots else None


class _Pass(NamedTuple):
    """What the features of a training batch give."""

    recon: Float[Tensor, "batch widths"]  # b_dec not added
    penalised: Float[Tensor, ""]  # sum over tokens and features of f_j times its decoder norms
    fired: Bool[Tensor, " d_sae"]
    n_active: int


class Crosscoder(SAE):
    """``encode`` takes [..., n_slots, d_in], ``decode`` gives it back. Decoder norms are free in training.

    ``slot_scale`` holds what folding did to the decoder of each slot, so that norms are compared in the units of the
    training, where all slots are of one size: 1 until then.
    """

    cfg: CrosscoderConfig
    slot_scale: Float[Tensor, " slots"]
    threshold: Float[Tensor, ""]
    n_updates: Tensor

    def __init__(self, cfg: CrosscoderConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        """Each feature has one random direction in all slots that it writes, and reads their mean along it."""
        super().__init__(cfg, d_in, generator=generator)
        size = _L1_NORM if cfg.sparsity == "l1" else 1.0
        shared = size * self.W_dec.detach()[:, None] * self.membership[:, :, None]
        self.W_dec = nn.Parameter(shared.clone())
        self.encoder = nn.Parameter(shared / self.membership.sum(1)[:, None, None])
        self.b_dec = nn.Parameter(torch.zeros(cfg.n_slots, d_in))
        self.register_buffer("slot_scale", torch.ones(cfg.n_slots))
        if cfg.sparsity == "batchtopk":
            self.register_buffer("threshold", torch.zeros(()))
            self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))

    @property
    def W_enc(self) -> Float[Tensor, "slots d_in d_sae"]:
        return self.encoder.permute(1, 2, 0)

    @property
    def d_in(self) -> int:
        """Width of a slot."""
        return self.encoder.shape[-1]

    @property
    def n_slots(self) -> int:
        return self.cfg.n_slots

    @property
    def membership(self) -> Bool[Tensor, "d_sae slots"]:
        """Which slots each feature reads and writes."""
        features = torch.arange(self.cfg.d_sae, device=self.W_dec.device)[:, None]
        slots = torch.arange(self.cfg.n_slots, device=self.W_dec.device)
        shared = features >= self.cfg.n_exclusive * self.cfg.n_slots
        return shared | (features // max(1, self.cfg.n_exclusive) == slots)

    @property
    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """Sum over slots of the norm of what each feature writes, in the units of the training."""
        norms = torch.linalg.vector_norm(self._blocks(self.W_dec).unflatten(1, (self.n_slots, -1)), dim=2)
        return norms @ self.slot_scale

    def encode(self, acts: Float[Tensor, "*batch slots d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, dense.

        Raises:
            ShapeError: ``acts`` has other slots or another width than the crosscoder reads.
        """
        return self._activate(self.pre_acts(acts))

    def pre_acts(self, acts: Float[Tensor, "*batch slots d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """What enters the activation function."""
        return (self._checked(acts) - self.b_dec).flatten(-2) @ self._blocks(self.encoder).T + self.b_enc

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch slots d_in"]:
        """The reconstruction of every slot from dense feature activations.

        Raises:
            ShapeError: not one entry for each feature.
        """
        if feature_acts.shape[-1] != self.d_sae:
            raise ShapeError(
                f"decode got {feature_acts.shape[-1]} feature activations, but the crosscoder has "
                f"{self.d_sae} features; give what encode returned"
            )
        recon = feature_acts.to(self.dtype) @ self._blocks(self.W_dec)
        return recon.unflatten(-1, (self.n_slots, self.d_in)) + self.b_dec

    @torch.no_grad()
    def sparse_codes(self, acts: Float[Tensor, "batch slots d_in"]) -> SparseCodes:
        """The active features of each row. NaN counts as active, so that it does not vanish."""
        centred = (self._checked(acts) - self.b_dec).flatten(1)
        active = encode_above(centred, self._blocks(self.encoder), self.b_enc, self.activation_floor())
        return SparseCodes(active.tokens, active.features, active.acts)

    def activation_floor(self) -> Float[Tensor, " d_sae"]:
        """The threshold divided by the feature's decoder norms; 0 with l1."""
        if self.cfg.sparsity == "l1":
            return self.b_enc.new_zeros(self.d_sae)
        return (self.threshold.clamp_min(0) / self.decoder_norms).detach()

    def training_loss(
        self,
        acts: Float[Tensor, "batch slots d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Squared error of all slots plus the penalty (l1) or AuxK for ``dead`` (batchtopk), divided by their widths;
        with batchtopk it updates the threshold."""
        flat, b_dec = self._checked(acts).flatten(1), self.b_dec.flatten()
        encoder, W_dec = self._blocks(self.encoder), self._blocks(self.W_dec)
        features = self._trained(flat - b_dec, encoder, W_dec)
        error = features.recon + b_dec - flat
        reconstruction, sparsity, aux = error.pow(2).mean(), flat.new_zeros(()), flat.new_zeros(())
        if self.cfg.sparsity == "l1":
            coefficient = self.cfg.l1_coefficient * warmed_up(progress, share=self.cfg.l1_warmup_share)
            sparsity = features.penalised * (coefficient / flat.numel())
        elif self.cfg.aux_coefficient:
            aux = self.cfg.aux_coefficient * revival_loss(
                encoder,
                self.b_enc,
                W_dec,
                centred=(flat - b_dec).detach(),
                residual=-error,
                dead=dead,
                k_aux=n_revived(self.cfg, self.d_in),
                tokens=self.tokens,
            )
        return SAELoss(
            total=reconstruction + sparsity + aux,
            reconstruction=reconstruction.detach(),
            sparsity=sparsity.detach(),
            aux=aux.detach(),
            fired=features.fired,
            l0=flat.new_tensor(features.n_active / len(flat)),
        )

    def normalise_decoder_(self) -> None:
        """Nothing: the norms tell how much a feature is each slot's."""

    def project_decoder_grad_(self) -> None:
        """Nothing: the norms are free."""

    @torch.no_grad()
    def fold_(self, mean: Float[Tensor, "*slots d_in"], scale: float | Float[Tensor, " slots"]) -> None:
        """Make a crosscoder trained on ``scale * (acts - mean)`` of each slot work on raw activations; feature_acts are
        divided by the scale of the last slot, whose decoder stays as it is.

        Raises:
            ConfigError: not a positive scale for each slot.
        """
        scales = checked_scales(scale, self.n_slots)
        for slot, one in enumerate(scales):
            ratio = one / scales[-1]
            self.encoder[:, slot] *= ratio
            self.W_dec[:, slot] /= ratio
            self.slot_scale[slot] *= ratio
            self.b_dec[slot] = mean[slot].double() + self.b_dec[slot].double() / one
        self.b_enc.copy_(self.b_enc.double() / scales[-1])
        if self.cfg.sparsity == "batchtopk":
            self.threshold.copy_(self.threshold.double() / scales[-1])

    def _trained(
        self,
        centred: Float[Tensor, "batch widths"],
        encoder: Float[Tensor, "d_sae widths"],
        W_dec: Float[Tensor, "d_sae widths"],
    ) -> _Pass:
        """The features of a training batch, in pairs where few are active."""
        norms, none = self.decoder_norms, torch.zeros_like(self.b_enc)
        if self.cfg.sparsity == "batchtopk":
            # f = (f n) / n: the norms decide which features stay, and cancel in what these give and in its gradient
            fixed, n_kept = norms.detach(), self.cfg.k * len(centred) * self.tokens.size
            kept = largest_of_batch(centred, encoder * fixed[:, None], self.b_enc * fixed, n_kept, self.tokens)
            smallest, momentum = smallest_kept(kept.acts.detach(), self.tokens), self.cfg.threshold_momentum
            update_threshold_(self.threshold, self.n_updates, smallest, momentum=momentum)
            active = kept._replace(acts=kept.acts / fixed[kept.features])
        elif few_above(centred, encoder, self.b_enc, none):
            active = encode_above(centred, encoder, self.b_enc, none)
        else:
            feature_acts = (centred @ encoder.T + self.b_enc).relu()
            firing = feature_acts.detach() > 0
            return _Pass(feature_acts @ W_dec, feature_acts.sum(0) @ norms, firing.any(0), int(firing.sum()))
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=centred.device)
        fired[active.features] = True
        recon, penalised = ragged_decode(active, W_dec), active.acts @ norms[active.features]
        return _Pass(recon, penalised, fired, len(active.features))

    def _activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return pre_acts.relu() if self.cfg.sparsity == "l1" else jump_relu(pre_acts, self.activation_floor())

    def _blocks(self, weight: Float[Tensor, "d_sae slots d_in"]) -> Float[Tensor, "d_sae slots*d_in"]:
        """Rows of all slots side by side; zero, and so without gradient, where a feature is another slot's."""
        owned = weight * self.membership[:, :, None] if self.cfg.n_exclusive else weight
        return owned.flatten(1)

    def _checked(self, acts: Float[Tensor, "*batch slots width"]) -> Float[Tensor, "*batch slots width"]:
        """``acts`` in the precision of the crosscoder."""
        if acts.ndim < 2 or acts.shape[-2:] != self.b_dec.shape:
            raise ShapeError(
                f"the activations have shape {list(acts.shape)}, but this crosscoder reads {self.n_slots} slots of "
                f"width {self.d_in}; stack the activations of all slots, in their order"
            )
        return acts.to(self.dtype)


def relative_decoder_norms(
    W_dec: Float[Tensor, "d_sae slots d_in"], slot_scale: Float[Tensor, " slots"] | None = None
) -> Float[Tensor, "d_sae slots"]:
    """Share of each slot in the sum of a feature's decoder norms: 1 / slots where it is everybody's, 1 where it is this
    slot's alone, NaN where it writes nothing.

    With the ``slot_scale`` of a folded crosscoder in the units of the training. For two models Lindsey et al. 2024
    call a feature exclusive near 0 and 1; with an L1 penalty many such are artefacts (Minder et al. 2025).
    """
    norms = torch.linalg.vector_norm(W_dec, dim=2)
    if slot_scale is not None:
        norms = norms * slot_scale
    return norms / norms.sum(1, keepdim=True)
