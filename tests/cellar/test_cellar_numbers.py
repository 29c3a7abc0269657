from __future__ import annotations

import itertools

import numpy as np
import pytest

from saelab.metrics import METRICS, TIMINGS
from saelab.schedules import warmup_then_decay
from saelab.stats import bootstrap


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]


def test_the_interval_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    interval = bootstrap(ratio, np.stack([values, np.ones(400)], 1), draws=4000)
    assert interval.value == pytest.approx(values.mean())
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.03)


def test_identical_clusters_have_no_uncertainty():
    interval = bootstrap(ratio, np.full((10, 2), 2.0))
    assert interval == (1.0, 1.0, 1.0)


def test_the_bootstrap_is_seeded_and_refuses_nothing():
    sums = np.random.default_rng(1).random((20, 2))
    assert bootstrap(ratio, sums, seed=3) == bootstrap(ratio, sums, seed=3)
    with pytest.raises(ValueError, match="at least one cluster"):
        bootstrap(ratio, np.empty((0, 2)))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        sums = np.stack([rng.exponential(1.0, 60), np.ones(60)], 1)
        interval = bootstrap(ratio, sums, draws=300)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.86 <= covered / 200 <= 0.99


def test_the_schedule_rises_holds_and_falls():
    factors = [warmup_then_decay(s, n_steps=100, warmup_steps=10, decay_steps=20) for s in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[99] == pytest.approx(1 / 20)
    assert all(a >= b for a, b in itertools.pairwise(factors[80:]))
    assert warmup_then_decay(0, n_steps=5, warmup_steps=0, decay_steps=0) == 1.0


def test_metrics_are_named_once():
    assert len(METRICS) == len({m.name for m in METRICS.values()})
    assert set(METRICS) >= TIMINGS
