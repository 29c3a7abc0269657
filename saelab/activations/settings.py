"""What to capture: the settings of a store."""

from __future__ import annotations

from dataclasses import dataclass, field

from saelab.activations.store import DtypeName
from saelab.activations.text import TextConfig
from saelab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What to capture."""

    model: str = "demo"
    """"demo", a local directory, or a model of the Hugging Face hub."""
    hook_names: tuple[str, ...] = ("blocks.10.hook_resid_post",)
    """Where in the model; the forward pass ends at the last one."""
    text: TextConfig = field(default_factory=TextConfig)
    """Of what text."""
    tokens: int = 1_000_000
    """At most this many tokens, each row's BOS counted."""
    context: int = 128
    """Tokens in a row."""
    held_out: float = 0.05
    """Share of the documents, chosen by a hash of their text, that training never sees and evaluation alone sees."""
    rows_per_shard: int = 256
    """Rows in one file; an interrupted capture repeats at most one file."""
    batch_rows: int = 16
    """Rows in one forward pass."""
    dtype: DtypeName = "bfloat16"
    """How activations are stored; int8 and float8_e4m3fn take half the space and carry a scale for each token."""

    def __post_init__(self) -> None:
        if not self.hook_names or len(set(self.hook_names)) != len(self.hook_names):
            raise ConfigError(f"hook_names must name at least one hook, each once, got {list(self.hook_names)}")
        if self.context < 2:
            raise ConfigError(f"context must be at least 2 (BOS and a token), got {self.context}; 128 is usual")
        if self.tokens < self.context:
            raise ConfigError(f"tokens must be at least one row (context={self.context}), got {self.tokens}; raise it")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out must be at least 0 and below 1, got {self.held_out}; 0.05 is usual")
        for name in ("rows_per_shard", "batch_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; leave it out for the default")
