"""Shuffled batches from a store. Each batch is a function of its step alone: no state to save or to lose."""

from __future__ import annotations

from jaxtyping import Float32
from torch import Tensor

from saelab.activations.live import LiveBatches
from saelab.activations.moments import ActivationStats, moments
from saelab.activations.permutation import permuted
from saelab.activations.slots import Slot, SlotBatches
from saelab.activations.store import ActivationStore, Split

__all__ = ["ActivationStats", "Batches", "LiveBatches", "permuted"]


class Batches(SlotBatches):
    """Shuffled activations of one hook; see `SlotBatches` for what is left out and when it fails."""

    def __init__(
        self,
        store: ActivationStore,
        hook_name: str,
        *,
        batch_size: int,
        seed: int,
        split: Split = "train",
        outlier_factor: float | None = 10.0,
    ) -> None:
        super().__init__(
            [Slot(store, hook_name)], batch_size=batch_size, seed=seed, split=split, outlier_factor=outlier_factor
        )
        self.hook_name = self.slots[0].hook_name

    @property
    def norm_limit(self) -> float | None:
        """Tokens of a larger norm are outliers."""
        return None if self.norm_limits is None else self.norm_limits[0]

    def statistics(self, max_tokens: int | None = None) -> ActivationStats:
        """Statistics over the split, BOS and outliers left out; with ``max_tokens`` over rows spread through it."""
        return moments(tokens for (tokens,) in self._usual_tokens(self.slots, max_tokens))

    def _read(self, step: int) -> Float32[Tensor, "batch d_in"]:
        return self._gathered(self.slots[0], step)
