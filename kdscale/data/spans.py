"""Where two tokenizations of one text meet. Pure NumPy and plain lists.

A tokenization is the sequence of its tokens' ends, in bytes of the text from its beginning: never falling, and equal where a
token stands for no byte (an end of the document), or where it cannot be told where it ends.
"""

import numpy as np

Span = tuple[int, int, int, int]
"""First token and past the last of one side, then of the other."""


def align(ends: np.ndarray, other_ends: np.ndarray) -> list[Span]:
    """The shortest stretches that begin and end at a byte where both have a token's end, with at least one token on each side.

    In order, each token in at most one; spans follow each other without a gap. Tokens behind the last common end are in none.
    """
    own, other = ends.tolist(), other_ends.tolist()
    spans: list[Span] = []
    first = at = other_first = other_at = 0
    while at < len(own) and other_at < len(other):
        end, other_end = own[at], other[other_at]
        if end == other_end:
            at, other_at = at + 1, other_at + 1
            spans.append((first, at, other_first, other_at))
            first, other_first = at, other_at
        elif end < other_end:
            at += 1
        else:
            other_at += 1
    return spans


def cut(spans: list[Span], lengths: tuple[int, int], most: int) -> list[Span]:
    """Pieces of at most ``most`` tokens on either side, as long as they can be, that both sides cut at the same byte.

    Made of whole spans, of documents of ``lengths`` tokens. What lies behind the last span goes with the last piece as far as it
    fits; a span that alone is longer stands in no piece.
    """
    pieces: list[Span] = []
    begin: Span | None = None
    for span in spans:
        if begin is not None and max(span[1] - begin[0], span[3] - begin[2]) > most:
            begin = None
        if begin is None:
            if max(span[1] - span[0], span[3] - span[2]) > most:
                continue
            begin = span
            pieces.append(span)
        pieces[-1] = (begin[0], span[1], begin[2], span[3])
    if pieces and begin is not None:
        first, _, other_first, _ = pieces[-1]
        pieces[-1] = (first, min(lengths[0], first + most), other_first, min(lengths[1], other_first + most))
    return pieces
