"""What every sparse autoencoder shares: weights, shapes, folding of the input's normalisation, single features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saelab.dist import ALONE, Group
from saelab.errors import ConfigError, ShapeError
from saelab_kernels import Layer, SparseGrads, encode_above


@runtime_checkable
class SAEConfig(Protocol):
    """The settings of one architecture; its fields stand in the file of the architecture."""

    arch: ClassVar[str]

    @property
    def d_sae(self) -> int: ...


class SAELoss(NamedTuple):
    """What one training batch gives. The four losses are scalars; ``total`` is the one to differentiate."""

    total: Float[Tensor, ""]
    reconstruction: Float[Tensor, ""]  # mean |acts - recon|^2 / d_in; with mean |acts|^2 = d_in the unexplained share
    sparsity: Float[Tensor, ""]  # its coefficient included
    aux: Float[Tensor, ""]  # its coefficient included
    fired: Bool[Tensor, " d_sae"]  # features active on at least one token
    l0: Float[Tensor, ""]  # active features per token


class TrainingGradient(NamedTuple):
    """The losses of a batch and the gradient of their total, in the factors that ``feature_step`` takes."""

    losses: SAELoss
    sparse: SparseGrads


class SparseActs(NamedTuple):
    """The k features that a TopK SAE keeps for each token, largest first; some may be 0."""

    top_acts: Float[Tensor, "batch k"]
    top_indices: Int[Tensor, "batch k"]


class SparseCodes(NamedTuple):
    """All active (row, feature) pairs of a batch, sorted by row, then by feature: one form for all architectures."""

    rows: Int[Tensor, " n"]
    features: Int[Tensor, " n"]
    values: Float[Tensor, " n"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model's hook: where one of several activations of a token comes from."""

    model_name: str = ""
    """The model, as one would load it; empty where a file does not say."""
    model_sha256: str | None = None
    """Hash of the model's weights."""
    hook_name: str = ""
    """Empty where a file does not say."""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Where an SAE belongs: the model and hook that it reads, and the units of its input."""

    model_name: str = ""
    """The model, as one would load it; empty where a file does not say. Of several sources the first one's."""
    model_sha256: str | None = None
    """Hash of the model's weights."""
    hook_name: str = ""
    """The hook whose activations the SAE reads and reconstructs; empty where a file does not say."""
    sources: tuple[Source, ...] = ()
    """With more than one: input and target of a transcoder, the slots of a crosscoder, the two models of a difference
    SAE. Empty for an SAE that reads one hook of one model."""
    reads: Literal["activations", "difference"] = "activations"
    """Whether it reads what the sources give, or the second source minus the first."""
    context_size: int | None = None
    """Tokens in a training sequence."""
    dataset: str | None = None
    """Where the training text came from."""
    prepend_bos: bool = True
    """Whether sequences began with BOS in training."""
    mean_norm: float | None = None
    """Mean norm of the raw activations at the hook: the unit of a steering strength."""
    activation_scale: float | None = None
    """Factor on the activations in training, since folded into the weights."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What a file of another tool said besides; it is written back unchanged."""


class SAE(nn.Module):
    """``pre_acts = (acts - b_dec) @ W_enc + b_enc``, a sparse function of it, ``recon = feature_acts @ W_dec + b_dec``.

    Weights are stored feature-major, so that kernels read a feature's row in one piece; ``W_enc`` is the transposed
    view. An architecture defines ``_activate`` and, if it can be trained, ``training_loss``.
    """

    tokens: Group = ALONE
    """The processes over which the tokens of a training batch are spread."""

    pre_act_biases: ClassVar[tuple[str, ...]] = ("b_enc",)
    """The parameters in units of pre-activations."""

    def __init__(self, cfg: SAEConfig, d_in: int, *, generator: torch.Generator | None = None) -> None:
        """Random unit rows in W_dec, the encoder tied to them, biases zero."""
        super().__init__()
        if d_in < 1:
            raise ConfigError(f"d_in must be at least 1, got {d_in}; give the width of the hook")
        self.cfg = cfg
        self.metadata = Metadata()
        directions = nn.functional.normalize(torch.randn(cfg.d_sae, d_in, generator=generator), dim=1)
        self.encoder = nn.Parameter(directions.clone())
        self.W_dec = nn.Parameter(directions)
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.encoder.T

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_sae(self) -> int:
        return self.encoder.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[-1]

    @property
    def n_slots(self) -> int | None:
        """Activations of a token in training batches [batch, slots, d_in]; None where these are [batch, d_in]."""
        return None

    def read_slots(self, acts: Float[Tensor, "batch *slots d_in"]) -> Float[Tensor, "batch ..."]:
        """What ``encode`` takes of a training batch: all of it, unless the batch also holds a target."""
        return acts

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    def forward(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction, in the precision of the SAE."""
        return self.decode(self.encode(acts))

    def encode(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, dense.

        Raises:
            ShapeError: ``acts`` has another width than the SAE reads.
        """
        return self._activate(self.pre_acts(acts))

    def pre_acts(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """What enters the activation function."""
        return (self._checked(acts) - self.b_dec) @ self.W_enc + self.b_enc

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction from dense feature activations.

        Raises:
            ShapeError: not one entry for each feature.
        """
        if feature_acts.shape[-1] != self.d_sae:
            raise ShapeError(
                f"decode got {feature_acts.shape[-1]} feature activations, but the SAE has "
                f"{self.d_sae} features; give what encode returned"
            )
        return feature_acts.to(self.dtype) @ self.W_dec + self.b_dec

    @torch.no_grad()
    def sparse_codes(self, acts: Float[Tensor, "batch d_in"]) -> SparseCodes:
        """The active features of each row. NaN counts as active, so that it does not vanish."""
        floor = self.activation_floor()
        if floor is not None:
            active = encode_above(self._checked(acts) - self.b_dec, self.encoder, self.b_enc, floor)
            return SparseCodes(active.tokens, active.features, active.acts)
        feature_acts = self.encode(acts)
        rows, features = feature_acts.nonzero(as_tuple=True)
        return SparseCodes(rows, features, feature_acts[rows, features])

    def training_loss(
        self,
        acts: Float[Tensor, "batch *slots d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """Losses of a batch, with ``dead`` the features to revive. Inputs come normalised: mean |acts|^2 = d_in.

        ``progress`` is the share of the training that is done, between 0 and 1: what is warmed up or annealed is a
        function of it, so that there is no state to save. At 1 everything has its final value.

        Raises:
            ConfigError: the architecture is for inference only.
        """
        raise ConfigError(f"an SAE of architecture {self.cfg.arch!r} is for inference only; train another")

    def training_gradient(
        self,
        acts: Float[Tensor, "batch *slots d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> TrainingGradient | None:
        """The losses of ``training_loss`` with their gradient, computed without autograd and without [d_sae, d_in]
        tensors. None for an architecture whose gradient is dense, so that there is nothing to gain."""
        return None

    @property
    def lr_factors(self) -> dict[str, float]:
        """Factors on the learning rate of parameters that need another step than the weights, by name."""
        return {}

    @property
    def layer(self) -> Layer:
        """The weights as the kernels take them: feature-major, sharing memory with the parameters."""
        return Layer(self.encoder.detach(), self.W_dec.detach(), self.b_enc.detach(), self.b_dec.detach())

    def feature(self, index: int) -> Feature:
        """One feature of this SAE, for steering and reading.

        Raises:
            ShapeError: there is no such feature.
        """
        if not 0 <= index < self.d_sae:
            raise ShapeError(f"there is no feature {index}: this SAE has features 0 to {self.d_sae - 1}; choose one")
        return Feature(self, index)

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Scale each row of W_dec to norm 1; a row of zeros stays."""
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True)
        self.W_dec.div_(norms.clamp_min(torch.finfo(self.dtype).tiny))

    @torch.no_grad()
    def project_decoder_grad_(self) -> None:
        """Remove from the gradient of each unit row of W_dec the part along the row, which normalising would undo."""
        if self.W_dec.grad is not None:
            along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
            self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)

    @torch.no_grad()
    def fold_(self, mean: Float[Tensor, "*slots d_in"], scale: float | Float[Tensor, " slots"]) -> None:
        """Make an SAE trained on ``scale * (acts - mean)`` work on ``acts``; its feature_acts are divided by ``scale``.

        Raises:
            ConfigError: ``scale`` is not a positive number.
        """
        assert isinstance(scale, float)  # an architecture with slots folds each by itself
        if not 0 < scale < float("inf"):
            raise ConfigError(f"the scale to fold must be a positive number, got {scale}; was it estimated on zeros?")
        # through float64, so that each weight is rounded once
        for name in self.pre_act_biases:
            bias = self.get_parameter(name)
            bias.copy_(bias.double() / scale)
        self.b_dec.copy_(mean.double() + self.b_dec.double() / scale)

    def activation_floor(self) -> Float[Tensor, " d_sae"] | None:
        """The value that a feature's pre-activation passes whole if it exceeds it and is cut to 0 otherwise; None for
        an architecture whose features do not work one by one."""
        return None

    def _activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        raise NotImplementedError

    def _checked(self, acts: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """``acts`` in the precision of the SAE."""
        if acts.shape[-1] != self.d_in:
            hook = self.metadata.hook_name or "a hook"
            raise ShapeError(
                f"the activations have width {acts.shape[-1]}, but this SAE reads {hook} of width "
                f"{self.d_in}; give activations of the hook it was trained on"
            )
        return acts.to(self.dtype)


@dataclass(frozen=True)
class Feature:
    """Feature ``index`` of ``sae``."""

    sae: SAE
    index: int

    @property
    def direction(self) -> Float[Tensor, "*slots d_out"]:
        """What the feature adds to the reconstruction for each unit of activation: row ``index`` of W_dec."""
        return self.sae.W_dec[self.index].detach()

    @property
    def hook_name(self) -> str:
        return self.sae.metadata.hook_name

    @torch.no_grad()
    def activation(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*tokens"]:
        """How strongly the feature fires on each of ``acts``."""
        return self.sae.encode(acts)[..., self.index]
