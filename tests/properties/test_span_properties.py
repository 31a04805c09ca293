"""Two tokenizations of any text meet in the shortest spans, once each; pieces of them fit into rows on both sides."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kdscale.data.spans import align, cut


@st.composite
def tokenizations(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Ends of two tokenizations of one text, of tokens of no byte too."""
    length = draw(st.integers(1, 40))

    def one() -> list[int]:
        return [*sorted(draw(st.lists(st.integers(0, length), max_size=30))), length]

    return one(), one()


@given(tokenizations())
def test_spans_cover_the_text_once_and_are_minimal(both: tuple[list[int], list[int]]):
    own, other = both
    spans = align(np.array(own), np.array(other))
    at = (0, 0)
    for first, past, other_first, other_past in spans:
        assert (first, other_first) == at, "each token in one span, in order, without a gap"
        assert past > first
        assert other_past > other_first
        assert own[past - 1] == other[other_past - 1], "both end there"
        assert not set(own[first : past - 1]) & set(other[other_first : other_past - 1]), "and nowhere before"
        at = (past, other_past)
    assert own[at[0] - 1] == other[at[1] - 1] == own[-1], "to the last byte of the text"


@given(tokenizations())
def test_spans_are_the_same_from_either_side(both: tuple[list[int], list[int]]):
    own, other = map(np.array, both)
    assert [(c, d, a, b) for a, b, c, d in align(own, other)] == align(other, own)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30))
def test_one_tokenizer_aligns_token_by_token(lengths: list[int]):
    ends = np.cumsum(lengths)
    assert align(ends, ends) == [(n, n + 1, n, n + 1) for n in range(len(lengths))]


@given(tokenizations(), st.integers(1, 12))
def test_pieces_fit_and_leave_out_only_what_cannot_fit(both: tuple[list[int], list[int]], most: int):
    own, other = both
    spans = align(np.array(own), np.array(other))
    pieces = cut(spans, (len(own), len(other)), most)
    for first, past, other_first, other_past in pieces:
        assert 0 < past - first <= most
        assert 0 < other_past - other_first <= most
    ends = [(0, 0), *((past, other_past) for _, past, _, other_past in pieces)]
    assert all(a <= first and c <= other for (a, c), (first, _, other, _) in zip(ends[:-1], pieces, strict=True))
    for span in spans:
        inside = [
            one for one in pieces if one[0] <= span[0] and span[1] <= one[1] and one[2] <= span[2] and span[3] <= one[3]
        ]
        assert len(inside) == int(max(span[1] - span[0], span[3] - span[2]) <= most)
