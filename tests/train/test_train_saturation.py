"""The alarm of a saturated sparsity coefficient, on curves whose answer is known."""

from __future__ import annotations

import logging

import pytest
import torch

from saelab.sae.base import SAELoss
from saelab.train.saturation import Saturation, SaturationAlarm, Weighed, saturation


def curve(l0_at, *, coefficients, weight=1.0, reconstruction=0.2) -> list[Weighed]:
    """Points at ``coefficients``; the penalty is coefficient x L0 x ``weight`` / 100."""
    return [Weighed(c, l0_at(c), reconstruction, weight * c * l0_at(c) / 100) for c in coefficients]


RISING = [0.1 * step for step in range(21)]


def test_an_l0_that_falls_with_the_coefficient_is_not_saturated():
    for power in (-1.0, -0.3, -0.1):
        points = curve(lambda c, p=power: 100 * max(c, 0.1) ** p, coefficients=RISING, weight=5.0)
        assert all(saturation(points[:n]) is None for n in range(len(points) + 1))


def test_an_l0_that_has_stopped_falling_is_saturated():
    points = curve(lambda c: max(26.0, 478 - 1000 * c), coefficients=RISING)  # 26 from 0.452 on
    first = next(n for n in range(len(points)) if saturation(points[: n + 1]))
    assert points[first].coefficient == pytest.approx(1.0)  # the first at which the half was past 0.452 too
    found = saturation(points)
    assert isinstance(found, Saturation)
    assert (found.before.coefficient, found.after.coefficient) == (pytest.approx(1.0), pytest.approx(2.0))
    assert (found.before.l0, found.after.l0) == (26.0, 26.0)


def test_a_weak_penalty_is_not_called_saturated():
    assert saturation(curve(lambda c: 500.0, coefficients=[c / 1000 for c in RISING])) is None
    assert saturation(curve(lambda c: 500.0, coefficients=RISING)) is not None


def test_a_coefficient_that_does_not_grow_says_nothing():
    assert saturation(curve(lambda c: 26.0, coefficients=[2.0] * 50)) is None
    assert saturation(curve(lambda c: 26.0, coefficients=[2.0, 1.5, 1.1])) is None
    assert saturation([]) is None


def losses(l0: float, sparsity: float) -> SAELoss:
    parts = {"total": 0.2 + sparsity, "reconstruction": 0.2, "sparsity": sparsity, "aux": 0.0, "l0": l0}
    return SAELoss(fired=torch.ones(3, dtype=torch.bool), **{name: torch.tensor(part) for name, part in parts.items()})


def test_the_alarm_is_raised_once_with_numbers(caplog):
    alarm = SaturationAlarm()
    with caplog.at_level(logging.WARNING):
        for step in range(1001):
            progress = step / 1000
            alarm.watch(losses(300.0, 3 * progress), coefficient=10 * progress, progress=progress)
    assert len(caplog.records) == 1
    assert "took L0 from 300.0 to 300.0" in caplog.text
    assert "outweighs the error (0.2)" in caplog.text
    assert alarm.raised
    assert len(alarm.curve) <= 101


def test_a_healthy_training_raises_no_alarm(caplog):
    alarm = SaturationAlarm()
    for step in range(1001):
        progress = step / 1000
        alarm.watch(losses(300.0 / (1 + 10 * progress), 3 * progress), coefficient=10 * progress, progress=progress)
    assert not alarm.raised
    assert not caplog.records
