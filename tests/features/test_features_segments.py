from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from saelab.features.segments import first_n, first_of_run, positive_bits, rank_within, segment_max

SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=6)


def grouped(sizes):
    return np.repeat(np.arange(len(sizes)), sizes), np.concatenate([[0], np.cumsum(sizes)])


@given(SIZES)
def test_rank_counts_from_zero_in_every_group(sizes):
    groups, _ = grouped(sizes)
    assert rank_within(groups).tolist() == [i for size in sizes for i in range(size)]


@given(SIZES, st.integers(1, 3))
def test_first_n_is_the_beginning_of_every_group(sizes, n):
    groups, offsets = grouped(sizes)
    values = np.arange(len(groups)) * 7
    expected = [values[offsets[g] : offsets[g + 1]][:n].tolist() for g in range(len(sizes))]
    assert first_n(groups, values, len(sizes), n).tolist() == [row + [-1] * (n - len(row)) for row in expected]


@given(SIZES, st.randoms())
def test_segment_max_skips_empty_segments(sizes, random):
    _, offsets = grouped(sizes)
    values = np.array([random.random() for _ in range(offsets[-1])], np.float32)
    expected = [max(values[offsets[g] : offsets[g + 1]], default=0) for g in range(len(sizes))]
    np.testing.assert_array_equal(segment_max(values, offsets), np.array(expected, np.float32))


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=2, max_size=20))
def test_positive_bits_order_like_the_values(values):
    values = np.array(values, np.float32) + np.float32(0)
    bits = positive_bits(values)
    assert ((values[:-1] < values[1:]) == (bits[:-1] < bits[1:])).all()
    assert bits.max() < 2**32


def test_a_run_starts_where_any_column_changes():
    assert first_of_run(np.array([1, 1, 1, 2]), np.array([5, 5, 6, 6])).tolist() == [True, False, True, True]
