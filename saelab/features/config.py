"""Settings of an index."""

from __future__ import annotations

from dataclasses import dataclass

from saelab.errors import ConfigError

_COUNTS = (
    "n_examples", "window", "n_intervals", "per_interval", "n_logits", "n_neighbours", "n_tokens_kept", "n_bins",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """What an index keeps of every feature."""

    n_examples: int = 20
    """Top examples, at most one from each row of the store."""
    window: int = 32
    """Tokens shown of each example."""
    after: int = 7
    """How many of them stand after the peak, where the row allows it."""
    n_intervals: int = 5
    """Activation intervals downwards from the feature's maximum, each an octave; the lowest takes all that is below."""
    per_interval: int = 5
    """Examples drawn from each interval."""
    n_logits: int = 10
    """Promoted and suppressed tokens."""
    n_neighbours: int = 10
    """Nearest features by decoder cosine and by co-activation."""
    n_tokens_kept: int = 16
    """Tokens on which the feature fires most often, kept for the search by token."""
    n_bins: int = 50
    """Bins of the activation histogram downwards from the maximum, 8 an octave; the lowest takes all that is below."""
    max_tokens: int | None = None
    """Index only the first rows that hold this many tokens; none reads the whole store."""
    seed: int = 0
    """Seed of the interval samples and of the split into fitting and scoring documents."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}; raise it")
        if not 0 <= self.after < self.window:
            raise ConfigError(f"after must be between 0 and window-1={self.window - 1}, got {self.after}; lower it")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}; raise it, or leave it out")
