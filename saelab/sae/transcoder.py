"""The transcoder: it reads activations at one place and writes what a layer makes of them at another.

    f = activation(x W_enc + b_enc),  y_hat = f W_dec + b_dec          (Dunefsky et al. 2024, arXiv 2406.11944, eq. 3)
    y_hat = f W_dec + b_dec + W_skip x                                 (skip: Paulo et al. 2025, arXiv 2501.18823)

Training minimises |y - y_hat|^2 and, for ReLU, l1_coefficient |f|_1. b_dec belongs to the output alone: unlike that of
an autoencoder it is not subtracted from the input. Encoder and decoder rows live in different spaces, so they start
independent of each other; W_skip starts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saelab.errors import ConfigError
from saelab.sae.affine import few_above
from saelab.sae.auxk import check_settings, n_revived, revival_loss
from saelab.sae.base import SAE, SAELoss, SparseCodes
from saelab.sae.batch_threshold import check_momentum, update_threshold_
from saelab.sae.jumprelu import jump_relu
from saelab.sae.progress import check_share, warmed_up
from saelab.sae.slots import checked_scales, product64
from saelab.sae.spread import largest_of_batch, smallest_kept
from saelab_kernels import Ragged, encode_above, encode_topk, ragged_decode, sparse_decode


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig:
    arch: ClassVar[str] = "transcoder"

    d_sae: int
    """Number of features."""
    activation: Literal["topk", "batchtopk", "relu", "jumprelu"] = "topk"
    """Which features stay: the k largest of a token or of a batch, or all above 0; "jumprelu" is for inference only."""
    skip: bool = False
    """Add a linear map of the input to the output."""
    k: int = 32
    """Features kept for each token (topk), or on average over a batch (batchtopk)."""
    l1_coefficient: float = 1.0
    """Weight of the L1 norm of the feature activations against the summed squared error of a token (relu)."""
    l1_warmup_share: float = 0.05
    """Share of the training over which that weight rises from 0 (relu)."""
    aux_coefficient: float = 1 / 32
    """Weight of the auxiliary loss that revives dead features; 0 turns it off. Not for relu."""
    k_aux: int | None = None
    """Dead features used for each token in the auxiliary loss. Off: half the width of the output."""
    threshold_momentum: float = 0.99
    """How much of the inference threshold stays at each step (batchtopk)."""
    d_out: int | None = None
    """Width of the output. Off: that of the input, the only one that can be trained."""

    def __post_init__(self) -> None:
        k = self.k if self.activation in ("topk", "batchtopk") else 1
        check_settings(d_sae=self.d_sae, k=k, aux_coefficient=self.aux_coefficient, k_aux=self.k_aux)
        check_momentum(self.threshold_momentum)
        check_share("l1_warmup_share", self.l1_warmup_share)
        if self.l1_coefficient < 0:
            raise ConfigError(f"l1_coefficient must not be negative, got {self.l1_coefficient}; usual is 0.1 to 10")
        if self.d_out is not None and self.d_out < 1:
            raise ConfigError(f"d_out must be at least 1, got {self.d_out}; leave it out for the width of the input")


class _Pass(NamedTuple):
    """What the features of a training batch give."""

    recon: Float[Tensor, "batch d_out"]  # without W_skip
    l1: Float[Tensor, ""]  # sum of all activations
    fired: Bool[Tensor, " d_sae"]
    n_active: int


class Transcoder(SAE):
    """Trained on [batch, 2, d]: slot 0 is the input, slot 1 the target; ``encode`` and ``forward`` take inputs alone.

    With "batchtopk", ``encode`` uses the running threshold, and ``training_loss`` keeps the largest of its batch.
    """

    cfg: TranscoderConfig
    threshold: Float[Tensor, ""] | Float[Tensor, " d_sae"]
    n_updates: Tensor

    def __init__(self, cfg: TranscoderConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        """Random unit rows in the encoder and, drawn after them, in W_dec; all else zero."""
        super().__init__(cfg, d_in, generator=generator)
        d_out = cfg.d_out or d_in
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(cfg.d_sae, d_out, generator=generator), dim=1))
        self.b_dec = nn.Parameter(torch.zeros(d_out))
        if cfg.skip:
            self.W_skip = nn.Parameter(torch.zeros(d_out, d_in))
        if cfg.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(cfg.d_sae))
        elif cfg.activation == "batchtopk":
            self.register_buffer("threshold", torch.zeros(()))
            self.register_buffer("n_updates", torch.zeros((), dtype=torch.int64))

    @property
    def n_slots(self) -> int:
        """Input and target."""
        return 2

    def read_slots(self, acts: Float[Tensor, "batch *slots d_in"]) -> Float[Tensor, "batch d_in"]:
        """The input."""
        return acts[:, 0]

    def forward(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The output as the transcoder predicts it from ``acts``, skip included (which ``decode`` cannot know)."""
        return self._skipped(self.decode(self.encode(acts)), acts.to(self.dtype))

    def encode(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations of inputs, dense; equal pre-activations at the border of topk go to the lower index.

        Raises:
            ShapeError: ``acts`` has another width than the transcoder reads.
        """
        if self.cfg.activation != "topk":
            return super().encode(acts)
        rows = self._checked(acts).reshape(-1, self.d_in)
        top_acts, top_indices = encode_topk(rows, self.encoder, self.b_enc, self.cfg.k)
        feature_acts = top_acts.new_zeros(len(rows), self.d_sae).scatter(1, top_indices, top_acts)
        return feature_acts.view(*acts.shape[:-1], self.d_sae)

    def pre_acts(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """What enters the activation function."""
        return self._checked(acts) @ self.W_enc + self.b_enc

    @torch.no_grad()
    def sparse_codes(self, acts: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """The active features of each row. NaN counts as active, so that it does not vanish."""
        floor = self.activation_floor()
        if floor is not None:
            active = encode_above(self._checked(acts), self.encoder, self.b_enc, floor)
            return SparseCodes(active.tokens, active.features, active.acts)
        return super().sparse_codes(acts)

    def activation_floor(self) -> Float[Tensor, " d_sae"] | None:
        """The threshold, 0 where it is negative or where there is none; None for topk."""
        if self.cfg.activation == "topk":
            return None
        if self.cfg.activation == "relu":
            return self.b_enc.new_zeros(self.d_sae)
        return self.threshold.detach().clamp_min(0).expand(self.d_sae)

    def training_loss(
        self,
        acts: Float[Tensor, "batch 2 d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Squared error of the target divided by its width, plus the L1 norm (relu) or AuxK for ``dead`` features.

        Raises:
            ConfigError: a transcoder for inference only, or of an output of another width.
        """
        if self.cfg.activation == "jumprelu":
            raise ConfigError('a transcoder with activation "jumprelu" is for inference; train topk, batchtopk or relu')
        if self.d_out != self.d_in:
            raise ConfigError(
                f"a transcoder from width {self.d_in} to d_out={self.d_out} is for inference; "
                "train one between hooks of one width"
            )
        inputs, target = self._checked(acts).unbind(1)
        features = self._trained(inputs)
        error = self._skipped(features.recon, inputs) - target
        reconstruction, sparsity, aux = error.pow(2).mean(), error.new_zeros(()), error.new_zeros(())
        if self.cfg.activation == "relu":
            coefficient = self.cfg.l1_coefficient * warmed_up(progress, share=self.cfg.l1_warmup_share)
            sparsity = features.l1 * (coefficient / target.numel())
        elif self.cfg.aux_coefficient:
            aux = self.cfg.aux_coefficient * revival_loss(
                self.encoder,
                self.b_enc,
                self.W_dec,
                centred=inputs,
                residual=-error,
                dead=dead,
                k_aux=n_revived(self.cfg, self.d_out),
                tokens=self.tokens,
            )
        return SAELoss(
            total=reconstruction + sparsity + aux,
            reconstruction=reconstruction.detach(),
            sparsity=sparsity.detach(),
            aux=aux.detach(),
            fired=features.fired,
            l0=error.new_tensor(features.n_active / len(error)),
        )

    @torch.no_grad()
    def fold_(self, mean: Float[Tensor, "*slots d_in"], scale: float | Float[Tensor, " slots"]) -> None:
        """Make a transcoder trained on ``scale * (acts - mean)`` of each slot work on raw activations; feature_acts are
        divided by the scale of the output.

        Raises:
            ConfigError: not two positive scales.
        """
        scale_in, scale_out = checked_scales(scale, 2)
        ratio = scale_in / scale_out
        b_enc = (self.b_enc.double() - scale_in * product64(self.encoder, mean[0])) / scale_out
        b_dec = mean[1].double() + self.b_dec.double() / scale_out
        if self.cfg.skip:
            b_dec -= ratio * product64(self.W_skip, mean[0])
            self.W_skip.mul_(ratio)
        self.encoder.mul_(ratio)
        self.b_enc.copy_(b_enc)
        self.b_dec.copy_(b_dec)
        if self.cfg.activation in ("batchtopk", "jumprelu"):
            self.threshold.copy_(self.threshold.double() / scale_out)

    @torch.no_grad()
    def as_jumprelu(self) -> Transcoder:
        """What it is at inference: with batchtopk one that has the threshold for each feature, else itself."""
        if self.cfg.activation != "batchtopk":
            return self
        twin = Transcoder(replace(self.cfg, activation="jumprelu"), self.d_in).to(self.device, self.dtype)
        shared = {name: tensor for name, tensor in self.state_dict().items() if name not in ("threshold", "n_updates")}
        twin.load_state_dict(shared | {"threshold": self.threshold.expand(self.d_sae)})
        twin.metadata = self.metadata
        return twin

    def _activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return pre_acts.relu() if self.cfg.activation == "relu" else jump_relu(pre_acts, self.threshold)

    def _trained(self, inputs: Float[Tensor, "batch d_in"]) -> _Pass:
        """The features of a training batch, as the architecture chooses them there; in pairs where few are active."""
        floor, features = torch.zeros_like(self.b_enc), None
        if self.cfg.activation == "topk":
            acts, features = encode_topk(inputs, self.encoder, self.b_enc, self.cfg.k)
            recon = sparse_decode(acts, features, self.W_dec, self.b_dec)
        elif self.cfg.activation == "batchtopk":
            kept = self._largest(inputs)
            acts, features, recon = kept.acts, kept.features, ragged_decode(kept, self.W_dec, self.b_dec)
        elif few_above(inputs, self.encoder, self.b_enc, floor):
            firing = encode_above(inputs, self.encoder, self.b_enc, floor)
            acts, features, recon = firing.acts, firing.features, ragged_decode(firing, self.W_dec, self.b_dec)
        else:
            acts = self._activate(self.pre_acts(inputs))
            recon = self.decode(acts)
        active = acts.detach() > 0
        if features is None:
            return _Pass(recon, acts.sum(), active.any(0), int(active.sum()))
        fired = torch.zeros(self.d_sae, dtype=torch.bool, device=inputs.device)
        fired[features[active]] = True
        return _Pass(recon, acts.sum(), fired, int(active.sum()))

    def _largest(self, inputs: Float[Tensor, "batch d_in"]) -> Ragged:
        """What a batch keeps (batchtopk); updates the threshold."""
        n_kept = self.cfg.k * len(inputs) * self.tokens.size
        kept = largest_of_batch(inputs, self.encoder, self.b_enc, n_kept, self.tokens)
        smallest, momentum = smallest_kept(kept.acts.detach(), self.tokens), self.cfg.threshold_momentum
        update_threshold_(self.threshold, self.n_updates, smallest, momentum=momentum)
        return kept

    def _skipped(
        self, recon: Float[Tensor, "*batch d_out"], inputs: Float[Tensor, "*batch d_in"]
    ) -> Float[Tensor, "*batch d_out"]:
        """``recon`` with the linear map of the input added, where there is one."""
        return recon + inputs @ self.W_skip.T if self.cfg.skip else recon
