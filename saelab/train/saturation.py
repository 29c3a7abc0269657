"""The alarm of a sparsity penalty that has more weight than it can use: its coefficient grows and L0 does not fall.

Adam divides a gradient by its size. Where the penalty alone decides the gradient of what turns features off, as of
JumpReLU's thresholds, these move by the learning rate at every step, and no larger coefficient makes them faster. Users
who raise it further lose reconstruction and gain nothing; what helps is more steps, or a larger learning rate.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from saelab.sae.base import SAELoss

log = logging.getLogger(__name__)

#: Doubling the coefficient should take at least this share off L0.
_LEAST_FALL = 0.05
#: Points are taken this far apart, as a share of the training: one batch's L0 is noisy, and so is a short stretch.
_SPACING = 0.01


class Weighed(NamedTuple):
    """One point of a training: how much the penalty weighed, and what came of it."""

    coefficient: float
    l0: float
    reconstruction: float
    sparsity: float


class Saturation(NamedTuple):
    """Two points between which the coefficient at least doubled and L0 hardly fell."""

    before: Weighed
    after: Weighed


def saturation(curve: Sequence[Weighed]) -> Saturation | None:
    """Whether the coefficient no longer lowers L0 at the end of ``curve``.

    It does not if L0 has fallen by less than a twentieth since the coefficient was half as large, while the penalty is
    larger than the error that it is weighed against. A small penalty that does not lower L0 is not saturated but weak.
    """
    if not curve:
        return None
    after = curve[-1]
    halves = [point for point in curve if 0 < point.coefficient <= after.coefficient / 2]
    if not halves or after.sparsity <= after.reconstruction:
        return None
    before = halves[-1]
    return Saturation(before, after) if after.l0 > (1 - _LEAST_FALL) * before.l0 else None


class SaturationAlarm:
    """Watches a training and warns once, with numbers. It changes nothing, so nothing of it needs to be saved."""

    def __init__(self) -> None:
        self.curve: list[Weighed] = []
        self.raised = False
        self._next = 0.0

    def watch(self, losses: SAELoss, *, coefficient: float, progress: float) -> None:
        """Take note of a step at which the penalty had this coefficient."""
        if self.raised or progress < self._next:
            return
        self._next = progress + _SPACING
        values = (float(part.detach()) for part in (losses.l0, losses.reconstruction, losses.sparsity))
        self.curve.append(Weighed(coefficient, *values))
        found = saturation(self.curve)
        if found is not None:
            self.raised = True
            log.warning(
                "the sparsity coefficient is saturated: raising it from %.3g to %.3g took L0 from %.1f to %.1f while "
                "the penalty (%.3g) outweighs the error (%.3g); train longer or raise optim.lr instead of it",
                found.before.coefficient, found.after.coefficient, found.before.l0, found.after.l0,
                found.after.sparsity, found.after.reconstruction,
            )  # fmt: skip
