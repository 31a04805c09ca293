"""Two tokenizations of the same text: rows of both, and where they meet.

R = rows, L = columns of a row, S = spans, M = matched tokens.
"""

from dataclasses import dataclass, replace

import numpy as np

from kdscale.batch import TokenBatch
from kdscale.errors import PayloadError


@dataclass(frozen=True)
class Matches:
    """Tokens of two vocabularies that spell the same bytes, one to one."""

    student_M: np.ndarray
    """int64 ids."""
    teacher_M: np.ndarray
    """int64 ids, of the same tokens."""

    def __len__(self) -> int:
        return len(self.student_M)

    def partners(self, of_teacher: int) -> np.ndarray:
        """By teacher id (``of_teacher`` of them) the student's id of the same token, int64; -1 where it has none."""
        partner = np.full(of_teacher, -1, np.int64)
        partner[self.teacher_M] = self.student_M
        return partner

    def reversed(self) -> "Matches":
        """The same, seen from the other side."""
        return Matches(self.teacher_M, self.student_M)


@dataclass(frozen=True)
class PairedBatch(TokenBatch):
    """The student's rows, and beside them the teacher's rows of the same documents, cut at the same bytes."""

    teacher: TokenBatch
    """The teacher's rows: what its soft targets are about."""
    spans_S5: np.ndarray
    """int32: row, first and past-the-last column of the student's tokens, the same of the teacher's. The shortest stretches of
    text that both tokenizations end at, in order; those alone of which every token is trained on, on both sides."""
    bytes_RL: np.ndarray
    """int32; how many bytes of the text the student's token at a column stands for."""
    teacher_bytes_RL: np.ndarray
    """int32; the same of the teacher's tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher.num_rows != self.num_rows:
            raise PayloadError(
                f"{self.num_rows} rows of the student's stand beside {self.teacher.num_rows} of the teacher's"
            )

    @property
    def asked(self) -> TokenBatch:
        return self.teacher

    def cut(self, rows: slice) -> "PairedBatch":
        first, past, _ = rows.indices(self.num_rows)
        spans = self.spans_S5[(self.spans_S5[:, 0] >= first) & (self.spans_S5[:, 0] < past)].copy()
        spans[:, 0] -= first
        names = ("ids_RL", "segments_RL", "positions_RL", "predicts_RL", "bytes_RL", "teacher_bytes_RL")
        planes = {name: getattr(self, name)[rows] for name in names}
        return replace(self, **planes, teacher=self.teacher.cut(rows), spans_S5=spans)

    def untrained(self) -> "PairedBatch":
        return replace(
            self,
            predicts_RL=np.zeros_like(self.predicts_RL),
            teacher=self.teacher.untrained(),
            spans_S5=self.spans_S5[:0],
        )

    def aligned(self) -> np.ndarray:
        """bool [R, L]; the student's tokens that lie in a span."""
        found = np.zeros(self.ids_RL.shape, np.bool_)
        for row, first, past, _, _ in self.spans_S5.tolist():
            found[row, first:past] = True
        return found

    def predicted(self) -> np.ndarray:
        """bool [R, L]; the student's tokens that it is trained on (the token after each trained position)."""
        return _predicted(self)

    @property
    def coverage(self) -> float:
        """Share of the trained tokens that get a teacher signal."""
        return float(self.aligned().sum()) / max(1, self.num_tokens)

    @property
    def unaligned_bytes(self) -> int:
        """Bytes of trained tokens without a teacher signal."""
        return int(self.bytes_RL[self.predicted() & ~self.aligned()].sum())

    @property
    def num_bytes(self) -> int:
        """Bytes of the trained tokens."""
        return int(self.bytes_RL[self.predicted()].sum())

    @property
    def teacher_num_bytes(self) -> int:
        """Bytes of the tokens that the teacher predicts."""
        return int(self.teacher_bytes_RL[_predicted(self.teacher)].sum())

    def span_places(self) -> tuple[np.ndarray, np.ndarray]:
        """(student's, teacher's) places of the spans' tokens, int64 [S, 2] each: first and past the last of the trained
        positions that predict them, in row-major order, as ``labels`` counts them."""
        row_S, columns = self.spans_S5[:, 0], self.spans_S5[:, 1:]
        return _places(self, row_S, columns[:, :2]), _places(self.teacher, row_S, columns[:, 2:])


def _predicted(batch: TokenBatch) -> np.ndarray:
    predicted = np.zeros_like(batch.predicts_RL)
    predicted[:, 1:] = batch.predicts_RL[:, :-1]
    return predicted


def _places(batch: TokenBatch, row_S: np.ndarray, columns_S2: np.ndarray) -> np.ndarray:
    before_RL = np.cumsum(batch.predicts_RL.reshape(-1)).reshape(batch.predicts_RL.shape) - batch.predicts_RL
    # The position before a token predicts it; those of a span are all trained, so they follow each other.
    first_S = before_RL[row_S, columns_S2[:, 0] - 1]
    return np.stack([first_S, first_S + columns_S2[:, 1] - columns_S2[:, 0]], axis=1).astype(np.int64)
