"""What a training run is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from saelab.activations.capture import CacheConfig
from saelab.errors import ConfigError
from saelab.sae.architectures import TrainableConfig
from saelab.train.end_to_end import EndToEndConfig
from saelab.train.l0 import coefficient_of
from saelab.train.optim import OptimConfig
from saelab.train.sinks import SinkName


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    sae: TrainableConfig
    """Architecture and its settings."""
    hook_name: str | None = None
    """Hook point to train on. Off: the only one that the activations hold."""
    more_hooks: tuple[str, ...] = ()
    """Hook points whose activations a token has besides: the target of a transcoder, other layers of a crosscoder."""
    second_store: Literal["stacked", "subtracted"] | None = None
    """What a second store of the same tokens is for: the other model of a crosscoder ("stacked", --with), or what is
    taken off the activations first ("subtracted", --minus)."""
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
    target_l0: float | None = None
    """L0 to reach by moving the sparsity coefficient of an architecture that has one, from where it is set."""
    ema_decay: float | None = None
    """Publish a running mean of the weights that keeps this share at each step; usual is 0.999. Off: the last ones."""
    end_to_end: EndToEndConfig | None = None
    """Add the divergence of the model's output, with the SAE in place of the activations, to the loss. Off: not."""
    on_nonfinite: Literal["raise", "skip"] = "raise"
    """What to do when a loss or a gradient is not finite: stop with the batch written to a file, or leave the batch
    out, with weights, optimiser and counters as they were, and count it."""
    max_skips: int = 10
    """Batches left out in a row after which training stops all the same."""
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
        for name in (
            "batch_size",
            "stats_tokens",
            "log_every",
            "checkpoint_every",
            "keep_every",
            "dead_after_tokens",
            "max_skips",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}; raise it")
        if self.target_l0 is not None:
            if not 0 < self.target_l0 < self.sae.d_sae:
                raise ConfigError(
                    f"target_l0 must be above 0 and below d_sae={self.sae.d_sae}, got {self.target_l0}; correct it"
                )
            coefficient_of(self.sae)
        if self.end_to_end is not None and (self.more_hooks or self.second_store or self.live):
            raise ConfigError(
                "end_to_end needs an SAE that reads one hook of a store; leave out more_hooks, second_store and live"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be between 0 and 1, got {self.ema_decay}; 0.999 is usual")
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
