"""An SAE whose features are spread over processes: each holds some rows of the weights, and all see the same tokens.

    encode   each process finds its own best k of a token; only these are exchanged, and the k best of them are kept
    decode   each process adds up its own features; the sum over processes is the reconstruction
    AuxK     the same with the dead features
    update   gradients, projection, Adam and unit norm concern single rows; only the norm to clip at is a sum

It equals one process exactly: of equal pre-activations those of the lowest feature numbers are kept, whoever has them.
What is sent does not grow with the number of features: for each token k floats, and two vectors of its width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from saelab import dist
from saelab.errors import ConfigError
from saelab.sae.architectures import new_sae
from saelab.sae.auxk import n_revived
from saelab.sae.base import SAE, SAEConfig, SAELoss
from saelab.sae.batch_threshold import update_threshold_
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.jumprelu import jump_relu
from saelab.sae.spread import largest_of_batch, smallest_kept, total_variance
from saelab.sae.topk import TopKConfig
from saelab.train.parallel import ALONE, CheckpointStore, DataParallel, Layout
from saelab.train.sharded_checkpoint import BY_FEATURE, ShardedCheckpoints, placements
from saelab_kernels import Ragged, encode_topk, ragged_decode

#: Architectures whose features can be spread over processes.
FEATURE_SHARDED = ("topk", "batchtopk")


class FeatureSharded:
    """Features are spread over the processes of a row of the mesh, tokens over those of a column.

    Raises:
        ConfigError: an architecture that is not made for it, or a process would have no feature.
    """

    keeps_gradients = False

    def __init__(self, mesh: dist.Mesh, cfg: SAEConfig) -> None:
        n_shards = mesh.features.size
        if cfg.arch not in FEATURE_SHARDED:
            raise ConfigError(
                f"--feature-shards does not know architecture {cfg.arch!r}: only {' and '.join(FEATURE_SHARDED)} can "
                "be spread over processes by features; leave it out to share the tokens instead"
            )
        if shard_range(cfg.d_sae, n_shards - 1, n_shards).start >= cfg.d_sae:
            raise ConfigError(
                f"{cfg.d_sae} features on {n_shards} processes leave some without any; lower --feature-shards"
            )
        self.mesh = mesh

    def place(self, sae: SAE) -> SAE:
        return FeatureShard(sae, self.mesh)

    @torch.no_grad()
    def average_gradients_(self, sae: SAE) -> None:
        for parameter in sae.parameters():
            if parameter.grad is not None:
                gradient = _local(parameter.grad)
                gradient.copy_(self.mesh.data.mean(gradient))

    def firing_counts(self, sae: SAE, acts: Float[Tensor, "batch *slots d_in"]) -> Int[Tensor, " d_sae"]:
        assert isinstance(sae, FeatureShard)
        return self.mesh.data.sum(sae.of_all_features((sae.encode(acts) != 0).sum(0)))

    def checkpoints(self, directory: Path, *, keep_every: int | None) -> CheckpointStore:
        return ShardedCheckpoints(directory, self.mesh, keep_every=keep_every)

    def whole(self, sae: SAE) -> SAE:
        assert isinstance(sae, FeatureShard)
        return sae.gathered() if self.mesh.data.rank == 0 else sae


def layout_of(mesh: dist.Mesh, cfg: SAEConfig) -> Layout:
    """How to train ``cfg`` on ``mesh``.

    Raises:
        ConfigError: several processes cannot train it so.
    """
    if mesh is dist.ONE_PROCESS:
        return ALONE
    return FeatureSharded(mesh, cfg) if mesh.features.size > 1 else DataParallel(mesh, cfg)


def shard_range(n_features: int, rank: int, n_shards: int) -> range:
    """The features of shard ``rank``: equal parts but for the last, as torch's Shard(0) cuts."""
    size = -(-n_features // n_shards)
    return range(min(rank * size, n_features), min((rank + 1) * size, n_features))


class Rows(NamedTuple):
    """This process's rows of the weights."""

    W_enc: Float[Tensor, "rows d_in"]
    W_dec: Float[Tensor, "rows d_in"]
    b_enc: Float[Tensor, " rows"]
    b_dec: Float[Tensor, " d_in"]


class FeatureShard(SAE):
    """A range of the features of a TopK or BatchTopK SAE. Parameters are DTensors, of the shapes of the whole.

    Losses and masks are those of all features; ``encode`` gives this process's alone.
    """

    cfg: TopKConfig | BatchTopKConfig

    def __init__(self, whole: SAE, mesh: dist.Mesh) -> None:
        nn.Module.__init__(self)  # the weights exist already
        assert mesh.devices is not None
        self.cfg, self.metadata = whole.cfg, whole.metadata  # type: ignore[assignment]
        self.mesh, self.tokens = mesh, mesh.data
        for name, parameter in whole.named_parameters():
            places = placements(name, parameter.ndim)
            # None: every process has made the whole from one seed, so there is nothing to send
            shard = distribute_tensor(parameter.detach(), mesh.devices, places, src_data_rank=None)
            setattr(self, name, nn.Parameter(shard))
        for name, buffer in whole.named_buffers():
            self.register_buffer(name, buffer)

    @property
    def mine(self) -> range:
        """The features of this process."""
        return self._ranges()[self.mesh.features.rank]

    def training_loss(
        self,
        acts: Float[Tensor, "batch d_in"],
        *,
        dead: Bool[Tensor, " d_sae"] | None = None,
        progress: float = 1.0,
    ) -> SAELoss:
        """As the architecture's own, of this process's tokens; ``fired`` of all features."""
        acts, rows, features = self._checked(acts), self.rows(), self.mesh.features
        centred = acts - _Shared.apply(rows.b_dec, features)
        active = self._active(centred, rows)
        error = _Summed.apply(ragged_decode(active, rows.W_dec), features) + rows.b_dec - acts
        reconstruction = error.pow(2).mean()
        aux = self._aux(rows, centred.detach(), -error.detach(), dead if self.cfg.aux_coefficient else None)
        aux = self.cfg.aux_coefficient * aux
        n_firing = torch.bincount(active.features[active.acts.detach() > 0], minlength=len(self.mine))
        n_firing = self.of_all_features(n_firing)
        return SAELoss(
            total=reconstruction + aux,
            reconstruction=reconstruction.detach(),
            sparsity=torch.zeros_like(reconstruction.detach()),
            aux=aux.detach(),
            fired=n_firing > 0,
            l0=n_firing.sum().to(acts.dtype) / len(acts),
        )

    @torch.no_grad()
    def encode(self, acts: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch rows"]:
        """Activations of this process's features, dense, as the architecture computes them at inference."""
        acts, rows = self._checked(acts), self.rows()
        centred = (acts - rows.b_dec).reshape(-1, acts.shape[-1])
        if isinstance(self.cfg, BatchTopKConfig):
            feature_acts = jump_relu(F.linear(centred, rows.W_enc, rows.b_enc), self.get_buffer("threshold"))
        else:
            active = topk_of_shards(centred, rows.W_enc, rows.b_enc, self.cfg.k, self.mesh.features)
            feature_acts = centred.new_zeros(len(centred), len(rows.W_enc))
            feature_acts[active.tokens, active.features] = active.acts
        return feature_acts.view(*acts.shape[:-1], -1)

    def rows(self) -> Rows:
        """The local parts of the parameters; gradients of these reach the parameters."""
        return Rows(*(getattr(self, name).to_local() for name in ("encoder", "W_dec", "b_enc", "b_dec")))

    def of_all_features(self, counts: Int[Tensor, " rows"]) -> Int[Tensor, " d_sae"]:
        """Counts of all features from those of this process's."""
        padded = F.pad(counts.to(torch.int32), (0, len(self._ranges()[0]) - len(counts)))
        parts = self.mesh.features.gather(padded)
        return torch.cat([part[: len(some)] for part, some in zip(parts, self._ranges(), strict=True)])

    @torch.no_grad()
    def gathered(self) -> SAE:
        """The whole SAE on the first process of the features' group, this one on the others."""
        full = {name: self._gathered(name, _local(parameter)) for name, parameter in self.named_parameters()}
        if self.mesh.features.rank:
            return self
        with torch.device("meta"):
            sae = new_sae(self.cfg, d_in=self.d_in)
        sae.load_state_dict({**full, **dict(self.named_buffers())}, assign=True)
        sae.metadata = self.metadata
        return sae

    @torch.no_grad()
    def project_decoder_grad_(self) -> None:
        """Row by row, as every SAE."""
        if self.W_dec.grad is not None:
            gradient, rows = _local(self.W_dec.grad), _local(self.W_dec)
            gradient.addcmul_(torch.linalg.vecdot(gradient, rows)[:, None], rows, value=-1)

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Row by row, as every SAE."""
        rows = _local(self.W_dec)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows.div_(norms.clamp_min(torch.finfo(rows.dtype).tiny))

    @torch.no_grad()
    def fold_(self, mean: Float[Tensor, "*slots d_in"], scale: float | Float[Tensor, " slots"]) -> None:
        """As every SAE, this process's rows."""
        b_enc, b_dec = _local(self.b_enc), _local(self.b_dec)
        b_enc.copy_(b_enc.double() / scale)
        b_dec.copy_(mean.double() + b_dec.double() / scale)
        if isinstance(self.cfg, BatchTopKConfig):
            self.get_buffer("threshold").div_(scale)

    def _active(self, centred: Float[Tensor, "batch d_in"], rows: Rows) -> Ragged:
        """This process's share of the features that a training batch keeps; the threshold learns from it."""
        if isinstance(self.cfg, TopKConfig):
            return topk_of_shards(centred, rows.W_enc, rows.b_enc, self.cfg.k, self.mesh.features)
        world = self.mesh.world
        n_kept = self.cfg.k * len(centred) * self.mesh.data.size
        active = largest_of_batch(centred, rows.W_enc, rows.b_enc, n_kept, world)
        smallest = smallest_kept(active.acts.detach(), world)
        threshold, n_updates = self.get_buffer("threshold"), self.get_buffer("n_updates")
        update_threshold_(threshold, n_updates, smallest, momentum=self.cfg.threshold_momentum)
        return active

    def _aux(
        self,
        rows: Rows,
        centred: Float[Tensor, "batch d_in"],
        residual: Float[Tensor, "batch d_in"],
        dead: Bool[Tensor, " d_sae"] | None,
    ) -> Float[Tensor, ""]:
        """AuxK (`saelab.sae.auxk`) with the ``k_aux`` largest dead features of each token, whoever has them."""
        if dead is None or not dead.any():
            return residual.new_zeros(())
        k_aux = n_revived(self.cfg, self.d_in)
        n_dead = [int(dead[some.start : some.stop].sum()) for some in self._ranges()]
        here = dead[self.mine.start : self.mine.stop].nonzero().flatten()
        pre_acts = F.linear(centred, rows.W_enc[here], rows.b_enc[here])
        if sum(n_dead) > k_aux:
            width = min(k_aux, max(n_dead))
            values, places = pre_acts.detach().sort(dim=1, descending=True, stable=True)
            values, places = values[:, :width], places[:, :width]
            kept = torch.zeros_like(pre_acts, dtype=torch.bool)
            kept.scatter_(1, places, kept_of_shards(values, k_aux, width, self.mesh.features))
            pre_acts = pre_acts * kept
        recon = _Summed.apply(pre_acts.relu() @ rows.W_dec[here], self.mesh.features)
        variance = total_variance(residual, self.tokens)
        return (recon - residual).pow(2).sum() * self.tokens.size / variance.clamp_min(torch.finfo(variance.dtype).tiny)

    def _gathered(self, name: str, rows: Tensor) -> Tensor:
        if name not in BY_FEATURE:
            return rows
        ranges = self._ranges()
        padded = rows.new_zeros(len(ranges[0]), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = self.mesh.features.gather_to_first(padded)
        return torch.cat([part[: len(some)] for part, some in zip(parts, ranges, strict=False)]) if parts else rows

    def _ranges(self) -> list[range]:
        n_shards = self.mesh.features.size
        return [shard_range(self.cfg.d_sae, rank, n_shards) for rank in range(n_shards)]


def topk_of_shards(
    centred: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "rows d_in"],
    b_enc: Float[Tensor, " rows"],
    k: int,
    features: dist.Group,
) -> Ragged:
    """Those of this process's features that are among the k largest of a token over all processes.

    Activations after the ReLU; of equal pre-activations the lower feature number is taken, as in ``encode_topk``. Each
    process sends its k best pre-activations of each token: which features they belong to is nobody else's business.
    """
    top = encode_topk(centred, W_enc, b_enc, min(k, len(W_enc)), relu=False)
    kept = kept_of_shards(top.top_acts.detach(), k, k, features)
    indices, order = top.top_indices.sort(dim=1)
    kept = kept.gather(1, order)
    offsets = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)])
    return Ragged(top.top_acts.gather(1, order)[kept].relu(), indices[kept], offsets)


@torch.no_grad()
def kept_of_shards(
    values: Float[Tensor, "batch candidates"], k: int, width: int, features: dist.Group
) -> Bool[Tensor, "batch candidates"]:
    """Which of this process's candidates are among the k largest of a token over all processes.

    Candidates are sorted, largest first and of equals the lower feature first, and no more than ``width``, which is the
    same on all processes. Of equals their order in the concatenation is that of features, which a stable sort keeps.
    """
    n_here = values.shape[1]
    padded = F.pad(values, (0, width - n_here), value=-torch.inf)
    everyone = torch.cat(features.gather(padded), dim=1)
    best = everyone.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(everyone, dtype=torch.bool).scatter_(1, best, True)
    start = features.rank * width
    return kept[:, start : start + n_here]


class _Shared(torch.autograd.Function):
    """What all processes have alike; its gradient is the sum of what each finds for its own features."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, group: dist.Group) -> Tensor:
        ctx.group = group
        return shared.view_as(shared)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(grad), None


class _Summed(torch.autograd.Function):
    """The sum over processes, each of which then computes the same loss from it: its gradient is that of each part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.Group) -> Tensor:
        return group.sum(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is here; it shares its memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
