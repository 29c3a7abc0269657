"""What a training run is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from saelab.activations.capture import CacheConfig
from saelab.errors import ConfigError
from saelab.sae.architectures import TrainableConfig
from saelab.train.optim import OptimConfig
from saelab.train.sinks import SinkName


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    sae: TrainableConfig
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
