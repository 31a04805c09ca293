import numpy as np
import pytest

from kdscale.data.spans import align, cut


@pytest.mark.parametrize(
    ("own", "other", "expected"),
    [
        ([1, 3, 6], [1, 3, 6], [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)]),
        ([2, 5], [1, 2, 3, 5], [(0, 1, 0, 2), (1, 2, 2, 4)]),
        ([2, 4, 6], [3, 6], [(0, 3, 0, 2)]),
        # Ends of documents stand for no byte, and meet.
        ([2, 4, 4], [4, 4], [(0, 2, 0, 1), (2, 3, 1, 2)]),
        # One side opens the text with a token, or goes on where the other has ended.
        ([0, 3], [3], [(0, 2, 0, 1)]),
        ([3, 5], [3], [(0, 1, 0, 1)]),
        ([3, 3], [3], [(0, 1, 0, 1)]),
        ([], [3], []),
    ],
    ids=str,
)
def test_spans_end_where_both_do(own: list[int], other: list[int], expected: list[tuple[int, ...]]):
    assert align(np.array(own), np.array(other)) == expected


def test_pieces_are_whole_spans_that_fit_on_both_sides():
    spans = align(np.array([2, 4, 6, 8, 9, 9]), np.array([1, 2, 3, 4, 8, 9]))
    assert spans == [(0, 1, 0, 2), (1, 2, 2, 4), (2, 4, 4, 5), (4, 5, 5, 6)]
    # The token at the end that has no partner goes with the last piece.
    assert cut(spans, (6, 6), 3) == [(0, 1, 0, 2), (1, 4, 2, 5), (4, 6, 5, 6)]
    assert cut(spans, (6, 6), 6) == [(0, 6, 0, 6)]


def test_a_span_longer_than_a_row_is_left_out():
    spans = align(np.array([1, 2, 9, 10]), np.array([1, 3, 5, 7, 9, 10]))
    assert spans == [(0, 1, 0, 1), (1, 3, 1, 5), (3, 4, 5, 6)]
    assert cut(spans, (4, 6), 3) == [(0, 1, 0, 1), (3, 4, 5, 6)]
    assert cut([], (4, 6), 3) == []
