"""Documents to fixed rows: pieces, rows of pieces, and the arrays of one row. Pure NumPy.

L = columns of a row.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Packing = Literal["isolated", "joined", "off"]


@dataclass(frozen=True)
class RowTable:
    """Which piece of which document stands in which row. Row ``r`` holds pieces ``starts[r] : starts[r + 1]``."""

    documents: np.ndarray
    """int64, by piece."""
    offsets: np.ndarray
    """int64, by piece: its first token in the document."""
    lengths: np.ndarray
    """int64, by piece."""
    starts: np.ndarray
    """int64 [rows + 1]."""

    def __len__(self) -> int:
        return len(self.starts) - 1


def pack(document_lengths: np.ndarray, row_tokens: int, packing: Packing) -> RowTable:
    """Cut documents into pieces of at most ``row_tokens`` and lay them into rows.

    A document's pieces depend on the document alone, so its soft targets do not depend on its neighbours or the shuffle.
    ``off`` gives each piece a row of its own; the others fill rows by best fit, longest pieces first.
    """
    documents, offsets, lengths = _pieces(np.asarray(document_lengths, np.int64), row_tokens)
    if packing == "off":
        return RowTable(documents, offsets, lengths, np.arange(len(documents) + 1, dtype=np.int64))
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    # Rows by the room left in them, so that the tightest fitting row is found in at most ``row_tokens`` looks.
    by_room: list[list[int]] = [[] for _ in range(row_tokens + 1)]
    roomy = 0
    for piece in order.tolist():
        length = int(lengths[piece])
        room = next((room for room in range(length, roomy + 1) if by_room[room]), None)
        if room is None:
            rows.append([piece])
            row, room = len(rows) - 1, row_tokens
        else:
            row = by_room[room].pop()
            rows[row].append(piece)
        by_room[room - length].append(row)
        roomy = max(roomy, room - length)
    flat = np.array([piece for row in rows for piece in row], np.int64)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
    return RowTable(documents[flat], offsets[flat], lengths[flat], starts)


def _pieces(document_lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = -(-document_lengths // row_tokens)
    documents = np.repeat(np.arange(len(document_lengths), dtype=np.int64), counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    offsets = (np.arange(len(documents), dtype=np.int64) - firsts) * row_tokens
    lengths = np.minimum(row_tokens, document_lengths[documents] - offsets)
    # A piece of one token predicts nothing.
    worth = lengths > 1
    return documents[worth], offsets[worth], lengths[worth]


@dataclass(frozen=True)
class Row:
    """The arrays of one row, each [L]; see ``TokenBatch``."""

    ids: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    predicts: np.ndarray


def build_row(pieces: list[tuple[np.ndarray, np.ndarray]], row_tokens: int, packing: Packing) -> Row:
    """Lay (ids, trained) pieces side by side and fill up with padding.

    ``isolated`` and ``off``: each piece is a segment, positions restart. ``joined``: the row is one segment, so a piece's
    last token may predict the first of the next.
    """
    row = Row(
        ids=np.zeros(row_tokens, np.int32),
        segments=np.zeros(row_tokens, np.int32),
        positions=np.zeros(row_tokens, np.int32),
        predicts=np.zeros(row_tokens, np.bool_),
    )
    trained_row = np.zeros(row_tokens, np.bool_)
    used = 0
    for number, (ids, trained) in enumerate(pieces, start=1):
        here = slice(used, used + len(ids))
        row.ids[here] = ids
        trained_row[here] = trained
        row.segments[here] = 1 if packing == "joined" else number
        row.positions[here] = np.arange(len(ids)) + (used if packing == "joined" else 0)
        used += len(ids)
    row.positions[used:] = np.arange(row_tokens - used)
    same = (row.segments[:-1] == row.segments[1:]) & (row.segments[1:] != 0)
    row.predicts[:-1] = same & trained_row[1:]
    return row
