from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.activations.packing import PackedRow, pack
from saelab.activations.text import Document, is_held_out

BOS = 256


def encode(text: str) -> list[int]:
    return list(text.encode())


def packed(texts: list[str], **changes: object) -> list[PackedRow]:
    arguments = {"context": 5, "bos_id": BOS, "held_out": 0.3, "max_tokens": 10**6} | changes
    documents = (Document(text, f"title {i}") for i, text in enumerate(texts))
    return list(pack(documents, encode, **arguments))  # type: ignore[arg-type]


def test_documents_follow_one_another_behind_a_bos_in_each_row():
    rows = packed(["abcdef", "", "ghijkl"], held_out=0.0)
    assert [row.tokens.tolist() for row in rows] == [
        [BOS, *b"abcd"],
        [BOS, *b"efgh"],
        [BOS, *b"ijkl"],
    ]
    assert [row.doc.tolist() for row in rows] == [[0, 0, 0, 0, 0], [0, 0, 0, 2, 2], [2, 2, 2, 2, 2]]


@settings(deadline=None)
@given(st.lists(st.text(max_size=40), max_size=12), st.integers(2, 9), st.sampled_from([0.0, 0.3, 0.9]))
def test_each_split_is_its_documents_in_order_less_an_unfinished_row(texts: list[str], context: int, fraction: float):
    rows = packed(texts, context=context, held_out=fraction)
    for held_out in (False, True):
        mine = [(token, i) for i, t in enumerate(texts) if is_held_out(t, fraction) == held_out for token in encode(t)]
        mine = mine[: len(mine) // (context - 1) * (context - 1)]
        found = [pair for r in rows if r.held_out == held_out for pair in zip(r.tokens[1:], r.doc[1:], strict=True)]
        assert found == mine
    for row in rows:
        assert row.tokens.shape == row.doc.shape == (context,)
        assert row.tokens.dtype == row.doc.dtype == np.int32
        assert row.tokens[0] == BOS
        assert row.doc[0] == row.doc[1]


def test_rows_come_in_the_order_of_completion():
    texts = [f"document number {i} " * 3 for i in range(40)]
    last = [row.doc[-1] for row in packed(texts)]
    assert last == sorted(last)
    assert {row.held_out for row in packed(texts)} == {True, False}


@pytest.mark.parametrize(("max_tokens", "n_rows"), [(4, 0), (5, 1), (9, 1), (10, 2), (10**6, 6)])
def test_the_budget_counts_whole_rows_with_their_bos(max_tokens: int, n_rows: int):
    rows = packed(["abcdefghijkl", "mnopqrstuvwx"], held_out=0.0, max_tokens=max_tokens)
    assert len(rows) == n_rows


def test_nothing_is_read_after_the_budget_is_spent():
    def endless() -> object:
        yield Document("abcdefghijkl", "")
        yield Document("abcdefghijkl", "")
        pytest.fail("read a third document")

    rows = list(pack(endless(), encode, context=5, bos_id=BOS, held_out=0.0, max_tokens=30))  # type: ignore[arg-type]
    assert len(rows) == 6


def test_long_documents_are_cut_and_numbers_do_not_shift():
    rows = packed(["abcdefghijkl", "mnop"], held_out=0.0, max_tokens_per_document=4)
    assert [row.tokens.tolist() for row in rows] == [[BOS, *b"abcd"], [BOS, *b"mnop"]]
    assert rows[1].doc.tolist() == [1] * 5
