"""Batches of tokens with more than one vector each: several hooks of a store, or two models that read the same text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from saelab.activations.moments import ActivationStats, moments
from saelab.activations.slots import Slot, SlotBatches
from saelab.activations.store import ActivationStore, Split
from saelab.errors import ArtifactError, ConfigError, ShapeError

__all__ = ["DifferenceBatches", "Slot", "StackedBatches", "check_pair"]

_ROWS_COMPARED = 1024  # at once


class StackedBatches(SlotBatches):
    """Shuffled tokens with one vector for each slot, in the order given.

    Slots are hooks of one store (the layers of a crosscoder; a transcoder's input and target), or the same hook of
    stores that were captured with ``--like`` (a crosscoder over models). See `SlotBatches` for what is left out.

    Raises:
        ConfigError: fewer than two slots, no such hook, or a batch larger than the split.
        ShapeError: slots of different widths.
        ArtifactError: stores of different tokens.
        TextError: the split is empty.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        batch_size: int,
        seed: int,
        split: Split = "train",
        outlier_factor: float | None = 10.0,
    ) -> None:
        if len(slots) < 2:
            raise ConfigError(f"stacked batches need at least 2 slots, got {len(slots)}; name more hooks or stores")
        _check_slots(slots)
        super().__init__(slots, batch_size=batch_size, seed=seed, split=split, outlier_factor=outlier_factor)

    def statistics(self, max_tokens: int | None = None) -> tuple[ActivationStats, ...]:
        """Statistics of each slot, over the same tokens as `Batches.statistics`."""
        return tuple(moments(tokens for (tokens,) in self._usual_tokens([slot], max_tokens)) for slot in self.slots)

    def _read(self, step: int) -> Float32[Tensor, "batch slots d_in"]:
        return torch.stack([self._gathered(slot, step) for slot in self.slots], dim=1)


class DifferenceBatches(SlotBatches):
    """Shuffled differences, second minus first, of what two models compute for the same tokens at a hook.

    Outliers are tokens of outlying norm in either store, those that `StackedBatches` leaves out too: a token on which
    the models differ much is what a difference SAE is for. See `SlotBatches` for the rest.

    Raises:
        ConfigError: no such hook, or a batch larger than the split.
        ShapeError: different widths.
        ArtifactError: stores of different tokens.
        TextError: the split is empty.
    """

    def __init__(
        self,
        first: ActivationStore,
        second: ActivationStore,
        hook_name: str,
        *,
        batch_size: int,
        seed: int,
        split: Split = "train",
        outlier_factor: float | None = 10.0,
    ) -> None:
        slots = [Slot(first, hook_name), Slot(second, hook_name)]
        _check_slots(slots)
        super().__init__(slots, batch_size=batch_size, seed=seed, split=split, outlier_factor=outlier_factor)
        self.hook_name = self.slots[0].hook_name

    def statistics(self, max_tokens: int | None = None) -> ActivationStats:
        """Statistics of the differences, over the same tokens as `Batches.statistics`."""
        return moments(second - first for first, second in self._usual_tokens(self.slots, max_tokens))

    def _read(self, step: int) -> Float32[Tensor, "batch d_in"]:
        first, second = (self._gathered(slot, step) for slot in self.slots)
        return second - first


def check_pair(first: ActivationStore, second: ActivationStore) -> None:
    """Raise ArtifactError unless both stores hold the same tokens of the same documents, split alike."""
    cure = f"capture the second model with: saelab cache --like {first.path}"
    sizes = [(store.n_rows, store.context) for store in (first, second)]
    if sizes[0] != sizes[1]:
        (n_rows, seq), (n_other, other_seq) = sizes
        raise ArtifactError(
            f"{first.path} holds {n_rows} rows of {seq} tokens, but {second.path} {n_other} of {other_seq}; {cure}"
        )
    if not np.array_equal(first.rows("held_out"), second.rows("held_out")):
        raise ArtifactError(f"{first.path} and {second.path} hold out different rows; {cure}")
    for start in range(0, first.n_rows, _ROWS_COMPARED):
        rows = np.arange(start, min(start + _ROWS_COMPARED, first.n_rows))
        same = (first.tokens(rows) == second.tokens(rows)).all(1) & (first.docs(rows) == second.docs(rows)).all(1)
        if not same.all():
            row = int(rows[int((~same).int().argmax())])
            raise ArtifactError(f"the tokens of {first.path} and {second.path} differ from row {row} on; {cure}")


def _check_slots(slots: Sequence[Slot]) -> None:
    first = slots[0]
    for store, hook_name in slots[1:]:
        width, other = first.store.d_in(first.hook_name), store.d_in(hook_name)
        if width != other:
            raise ShapeError(
                f"{first.hook_name} of {first.store.path} has width {width}, but {hook_name} of {store.path} has "
                f"{other}; choose hooks of one width"
            )
        if store.path != first.store.path:
            check_pair(first.store, store)
