"""Train a sparse autoencoder on batches of activations. The loop is the algorithm; everything else is handed in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab import config as configs
from saelab.activations.capture import CacheConfig
from saelab.activations.loader import ActivationStats
from saelab.checkpoint import Checkpoint, Checkpoints
from saelab.errors import ConfigError, Interrupted, TrainingError
from saelab.interrupts import deferred
from saelab.rundir import StageWriter
from saelab.sae.architectures import new_sae
from saelab.sae.base import SAE, Metadata, SAELoss
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.io import save_sae
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig
from saelab.train.dead import DeadFeatures
from saelab.train.fused import fused_step_
from saelab.train.optim import OptimConfig, adam, restore_state_, state_tensors
from saelab.train.sinks import SinkName, Sinks
from saelab_kernels import choose

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    sae: ReLUConfig | TopKConfig | BatchTopKConfig
    """Architecture and its settings."""
    hook_name: str | None = None
    """Hook point to train on. Off: the only one that the activations hold."""
    tokens: int = 10_000_000
    """Training tokens, counted with repetition when the activations hold fewer."""
    batch_size: int = 2048
    """Tokens in a step."""
    seed: int = 0
    """Seed of the initial weights and of the order of the tokens."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Adam and its learning rate."""
    centre: bool = True
    """Subtract the mean activation, estimated first and folded into b_dec; it is what keeps features from dying at the
    start (arXiv 2605.31518). The seed architecture (relu with b_dec = "zero") is never centred."""
    stats_tokens: int = 100_000
    """Tokens from which mean and scale are estimated."""
    outlier_factor: float | None = 10.0
    """Tokens whose norm exceeds this many times the median are left out and counted."""
    dead_after_tokens: int | None = None
    """A feature silent for so many training tokens counts as dead. Off: a tenth of the training, at most 10 million."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between two checkpoints."""
    keep_every: int | None = None
    """Checkpoints of steps divisible by this stay; the last two always do."""
    log_to: tuple[SinkName, ...] = ()
    """More places for the metrics: "tensorboard", "wandb"."""
    live: CacheConfig | None = None
    """Run the model during training with these settings, instead of reading activations from the disk. Their ``tokens``
    is the length of a pass over the text."""

    def __post_init__(self) -> None:
        if self.tokens < self.batch_size:
            raise ConfigError(
                f"tokens is {self.tokens}, less than one batch of {self.batch_size}; raise tokens or lower batch_size"
            )
        for name in ("batch_size", "stats_tokens", "log_every", "checkpoint_every", "keep_every", "dead_after_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}; raise it")
        if self.outlier_factor is not None and not self.outlier_factor > 1:
            raise ConfigError(
                f"outlier_factor is a multiple of the median norm above 1, got {self.outlier_factor}; 10 is usual"
            )

    @property
    def n_steps(self) -> int:
        return self.tokens // self.batch_size

    @property
    def dead_window(self) -> int:
        return min(10_000_000, self.tokens // 10) if self.dead_after_tokens is None else self.dead_after_tokens


@runtime_checkable
class ActivationBatches(Protocol):
    """What the loop needs of its data: a batch is a function of the step alone, so a resumed run sees the same ones."""

    @property
    def d_in(self) -> int: ...

    def at(self, step: int) -> Float[Tensor, "batch d_in"]: ...

    def statistics(self, max_tokens: int) -> ActivationStats: ...


@dataclass(frozen=True)
class Normaliser:
    """Centres activations and scales them to mean square norm d_in, so that settings carry over between models."""

    mean: Float[Tensor, " d_in"]
    scale: float

    @classmethod
    def fitted(cls, stats: ActivationStats, *, centre: bool) -> Normaliser:
        """The one that fits ``stats``; without ``centre`` it only scales.

        Raises:
            TrainingError: the activations do not vary, or are not finite.
        """
        mean = stats.mean if centre else torch.zeros_like(stats.mean)
        rms = stats.centred_norm if centre else math.sqrt(stats.centred_norm**2 + float(stats.mean.pow(2).sum()))
        if not 0 < rms < math.inf:
            raise TrainingError(
                f"the activations vary by {rms} about their mean, so there is nothing to learn; choose another hook"
            )
        return cls(mean, math.sqrt(len(mean)) / rms)

    def __call__(self, acts: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return (acts - self.mean) * self.scale


def train_sae(
    config: TrainConfig,
    batches: ActivationBatches,
    run: StageWriter,
    *,
    metadata: Metadata,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> SAE:
    """Train, checkpoint and publish an SAE in the stage directory of ``run``; continues from its latest checkpoint.

    The result works on raw activations: centring and scaling are folded into it. An uninterrupted run and one that
    was killed and resumed end with the same bytes.

    Raises:
        TrainingError: the loss stopped being a finite number.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint of the last whole step has been written.
    """
    trainer = _Trainer(config, batches, device)
    checkpoints = Checkpoints(run.path / "checkpoints", keep_every=config.keep_every)
    saved = checkpoints.latest()
    if saved:
        trainer.restore(saved)
    run.rewind_metrics(trainer.step)
    sinks = Sinks(run, config.log_to, configs.to_mapping(config))
    clock, clock_step = time.perf_counter(), trainer.step

    with deferred() as stop:
        while trainer.step < config.n_steps:
            losses = trainer.advance()
            if trainer.step % config.log_every == 0 or trainer.step == config.n_steps:
                elapsed, n_steps = time.perf_counter() - clock, trainer.step - clock_step
                sinks.write(
                    trainer.record(losses) | {"tokens_per_second": round(n_steps * config.batch_size / elapsed)}
                )
                clock, clock_step = time.perf_counter(), trainer.step
            # asked once: a request that comes after this line waits for the next step's checkpoint
            stopping = bool(stop)
            if trainer.step % config.checkpoint_every == 0 or stopping:
                checkpoints.save(trainer.step, trainer.tensors(), {})
            if progress:
                progress(trainer.step, config.n_steps, f"loss {float(losses.total):.3f}")
            if stopping:
                sinks.close()
                raise Interrupted(
                    f"stopped at step {trainer.step} of {config.n_steps}; "
                    f"continue with: saelab train --resume {run.path}"
                )
    sinks.close()

    density = trainer.density()
    sae = trainer.finished(metadata)
    save_sae(sae, run.path, density=density)
    run.finish()
    return sae


class _Trainer:
    """All state that a step changes, in one place: what is here is in the checkpoint, and nothing else matters."""

    def __init__(self, config: TrainConfig, batches: ActivationBatches, device: str | torch.device) -> None:
        self.config, self.batches, self.device = config, batches, torch.device(device)
        self.step = 0
        self.grad_norm = self.lr = 0.0
        at_origin = getattr(config.sae, "b_dec", None) == "zero"
        stats = batches.statistics(config.stats_tokens)
        self.mean_norm = stats.mean_norm
        fitted = Normaliser.fitted(stats, centre=config.centre and not at_origin)
        self.normalise = replace(fitted, mean=fitted.mean.to(self.device))
        generator = torch.Generator().manual_seed(config.seed)
        self.sae = new_sae(config.sae, d_in=batches.d_in, generator=generator).to(self.device)
        self.optimizer = adam(self.sae, config.optim)
        k = getattr(config.sae, "k", config.sae.d_sae)
        self.sparse_gradients = choose(self.device, n_features=config.sae.d_sae, k=k).name != "reference"
        self.dead = DeadFeatures(config.sae.d_sae, window_tokens=config.dead_window)

    def advance(self) -> SAELoss:
        """One step of Adam on the next batch."""
        config = self.config
        acts = self.normalise(self.batches.at(self.step).to(self.device))
        self.lr = config.optim.lr_at(self.step, n_steps=config.n_steps, d_sae=config.sae.d_sae)
        losses = self._update(acts, self.dead.mask.to(self.device))
        self.dead.update(losses.fired, n_tokens=len(acts))
        self.step += 1
        return losses._replace(total=losses.total.detach())

    def _update(self, acts: Float[Tensor, "batch d_in"], dead: Bool[Tensor, " d_sae"]) -> SAELoss:
        """Change the weights: without gradient tensors where the architecture and the kernels' path allow it."""
        if self.sparse_gradients:
            gradient = self.sae.training_gradient(acts, dead=dead)
            if gradient is not None:
                self._check_finite(acts, gradient.losses)
                norm = fused_step_(self.sae, self.optimizer, gradient.sparse, self.config.optim, lr=self.lr)
                self.grad_norm = float(norm)
                return gradient.losses
        losses = self.sae.training_loss(acts, dead=dead)
        self._check_finite(acts, losses)
        losses.total.backward()
        self.sae.project_decoder_grad_()
        limit = self.config.optim.clip_norm if self.config.optim.clip_norm is not None else math.inf
        self.grad_norm = float(torch.nn.utils.clip_grad_norm_(self.sae.parameters(), limit))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sae.normalise_decoder_()
        return losses

    def record(self, losses: SAELoss) -> dict[str, float | int]:
        """The line of metrics.jsonl for the step just made."""
        return {
            "step": self.step,
            "tokens": self.step * self.config.batch_size,
            "loss": float(losses.total),
            "reconstruction": float(losses.reconstruction),
            "sparsity": float(losses.sparsity),
            "aux": float(losses.aux),
            "l0": float(losses.l0),
            "n_dead": int(self.dead.mask.sum()),
            "lr": self.lr,
            "grad_norm": self.grad_norm,
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything a resumed run needs: weights, Adam's state, dead-feature counters, normalisation."""
        named = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        named |= {f"adam.{name}": value for name, value in state_tensors(self.optimizer, self.sae).items()}
        named["silent_tokens"] = self.dead.silent_tokens
        return {name: value.detach().cpu().contiguous() for name, value in named.items()}

    def restore(self, saved: Checkpoint) -> None:
        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v.to(self.device) for k, v in saved.tensors.items() if k.startswith(prefix)}

        self.sae.load_state_dict(under("sae."))
        restore_state_(self.optimizer, self.sae, under("adam."))
        self.dead.silent_tokens = saved.tensors["silent_tokens"]
        self.step = saved.step

    @torch.inference_mode()
    def density(self, n_batches: int = 20) -> Float[Tensor, " d_sae"]:
        """Share of tokens on which each feature fires, over the first batches of the data."""
        fired, n_tokens = torch.zeros(self.config.sae.d_sae), 0
        for step in range(n_batches):
            acts = self.normalise(self.batches.at(step).to(self.device))
            fired += (self.sae.encode(acts) > 0).sum(0).cpu()
            n_tokens += len(acts)
        return fired / n_tokens

    def finished(self, metadata: Metadata) -> SAE:
        """The trained SAE, working on raw activations."""
        self.sae.fold_(self.normalise.mean, self.normalise.scale)
        self.sae.metadata = replace(metadata, mean_norm=self.mean_norm, activation_scale=self.normalise.scale)
        return self.sae.eval()

    def _check_finite(self, acts: Float[Tensor, "batch d_in"], losses: SAELoss) -> None:
        if not torch.isfinite(losses.total):
            raise TrainingError(self._not_finite(acts, losses))

    def _not_finite(self, acts: Float[Tensor, "batch d_in"], losses: SAELoss) -> str:
        first, last = self.step * self.config.batch_size, (self.step + 1) * self.config.batch_size - 1
        bad = int((~torch.isfinite(acts)).any(1).sum())
        cause = (
            f"{bad} of its activations are not finite, so look at the data"
            if bad
            else "lower optim.lr or set optim.clip_norm"
        )
        return (
            f"the loss became {float(losses.total.detach())} at step {self.step} "
            f"(batch of tokens {first} to {last} in the order "
            f"of seed {self.config.seed}); {cause}; the last checkpoint is untouched"
        )


def memory_bytes(config: TrainConfig, d_in: int) -> int:
    """What weights, gradients and Adam's two moments take in float32."""
    n_parameters = 2 * d_in * config.sae.d_sae + d_in + config.sae.d_sae
    return 16 * n_parameters
