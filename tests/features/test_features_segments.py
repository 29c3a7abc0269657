from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from saelab.features.segments import first_of_run, positive_bits, rank_within

SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=6)


def grouped(sizes):
    return np.repeat(np.arange(len(sizes)), sizes), np.concatenate([[0], np.cumsum(sizes)])


@given(SIZES)
def test_rank_counts_from_zero_in_every_group(sizes):
    groups, _ = grouped(sizes)
    assert rank_within(groups).tolist() == [i for size in sizes for i in range(size)]


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=2, max_size=20))
def test_positive_bits_order_like_the_values(values):
    values = np.array(values, np.float32) + np.float32(0)
    bits = positive_bits(values)
    assert ((values[:-1] < values[1:]) == (bits[:-1] < bits[1:])).all()
    assert bits.max() < 2**32


def test_a_run_starts_where_any_column_changes():
    assert first_of_run(np.array([1, 1, 1, 2]), np.array([5, 5, 6, 6])).tolist() == [True, False, True, True]
