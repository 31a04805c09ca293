"""What crosses a process: token rows on the way to the teacher, soft targets on the way back.

R = rows, L = tokens in a row, T = positions trained on (row-major order), K = kept entries, D = hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch

from kdscale.errors import PayloadError

PADDING_SEGMENT = 0


@dataclass(frozen=True)
class TokenBatch:
    """Packed rows of tokens.

    A position ``i`` with ``predicts[r, i]`` is trained on: it predicts token ``i + 1`` of the same document.
    """

    number: int
    """The batch number ``n`` this is (or was cut from)."""
    ids_RL: np.ndarray
    """int32 token ids; padding holds any valid id."""
    segments_RL: np.ndarray
    """int32; 0 is padding, documents count from 1 in each row. Tokens see only their own segment."""
    positions_RL: np.ndarray
    """int32; restarts at 0 with every segment, padding included."""
    predicts_RL: np.ndarray
    """bool; the positions trained on. Never true in the last column or on padding."""

    def __post_init__(self) -> None:
        shape = self.ids_RL.shape
        for name, dtype in (("ids_RL", "i4"), ("segments_RL", "i4"), ("positions_RL", "i4"), ("predicts_RL", "?")):
            array = getattr(self, name)
            if array.shape != shape or array.ndim != 2 or array.dtype != np.dtype(dtype):
                raise PayloadError(f"{name} is {array.dtype}{array.shape}; it must be {dtype}{shape} in two dimensions")
        if shape[1] and self.predicts_RL[:, -1].any():
            raise PayloadError("the last column of a row predicts nothing: the next token lies outside the row")
        same = self.segments_RL[:, :-1] == self.segments_RL[:, 1:]
        inside = same & (self.segments_RL[:, :-1] != PADDING_SEGMENT)
        if (self.predicts_RL[:, :-1] & ~inside).any():
            raise PayloadError("a position predicts across a document's end or from padding")

    @property
    def num_rows(self) -> int:
        return int(self.ids_RL.shape[0])

    @property
    def num_tokens(self) -> int:
        """Tokens trained on, T."""
        return int(np.count_nonzero(self.predicts_RL))

    @property
    def num_tokens_real(self) -> int:
        """Tokens that are not padding: what a forward really reads."""
        return int(np.count_nonzero(self.segments_RL != PADDING_SEGMENT))

    def labels(self) -> np.ndarray:
        """The token each trained position predicts, int32 [T], in row-major order: the one place that shifts."""
        return self.ids_RL[:, 1:][self.predicts_RL[:, :-1]]

    def cut(self, rows: slice) -> "TokenBatch":
        """The given rows, as a batch of their own."""
        names = ("ids_RL", "segments_RL", "positions_RL", "predicts_RL")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def rows(self) -> "list[TokenBatch]":
        """Each row as a batch of its own."""
        return [self.cut(slice(row, row + 1)) for row in range(self.num_rows)]


@dataclass(frozen=True)
class SoftTargets:
    """What the teacher says of T positions. Every tensor has one row per position."""

    labels_T: torch.Tensor
    """int32; the token id each position predicts, as the teacher saw it."""

    def __len__(self) -> int:
        return int(self.labels_T.shape[0])

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """A copy with ``change`` applied to every tensor."""
        return replace(self, **{name: change(value) for name, value in self._tensors().items()})

    def cut(self, part: slice) -> Self:
        """The given positions."""
        return self.each(lambda tensor: tensor[part])

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors in the order of the fields, labels first."""
        return tuple(self._tensors().values())

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Self:
        """The same kind of targets around other tensors, in the order of ``tensors()``."""
        return replace(self, **dict(zip(self._tensors(), tensors, strict=True)))

    @classmethod
    def join(cls, parts: "Sequence[SoftTargets]") -> "SoftTargets":
        """One after the other; all of one kind."""
        if len(parts) == 1:
            return parts[0]
        groups = zip(*(part.tensors() for part in parts), strict=True)
        return parts[0].with_tensors([torch.cat(_even_widths(group)) for group in groups])


def _even_widths(planes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Planes [T, K] with zeros behind the last entry where others are wider (samples: as many as their positions need)."""
    if planes[0].dim() == 1 or len({plane.shape[1] for plane in planes}) == 1:
        return list(planes)
    widest = max(plane.shape[1] for plane in planes)
    return [torch.nn.functional.pad(plane, (0, widest - plane.shape[1])) for plane in planes]


@dataclass(frozen=True)
class TopkTargets(SoftTargets):
    """The K likeliest tokens per position and the mass of all others; log-probabilities in nats at ``temperature``."""

    ids_TK: torch.Tensor
    """int32, distinct in each row, the likeliest first."""
    logp_TK: torch.Tensor
    """float32, <= 0."""
    tail_logp_T: torch.Tensor
    """float32; log of the mass outside the K entries, ``-inf`` where there is none."""
    entropy_T: torch.Tensor
    """float32; the teacher's full entropy in nats at ``temperature``."""
    shift_T: torch.Tensor
    """float32; ``temperature * logp + shift`` is the log-probability at temperature 1 (0 where that is it)."""
    temperature: float


@dataclass(frozen=True)
class SampledTargets(SoftTargets):
    """Weighted draws from the teacher's distribution at ``temperature``: E[sum of the weights at an id] = p(id)."""

    ids_TK: torch.Tensor
    """int32; K is the most entries that any position has."""
    weight_TK: torch.Tensor
    """float32, >= 0; a row sums to 1, an unused entry has 0."""
    count_T: torch.Tensor
    """int32; the first so many entries are used."""
    kept_T: torch.Tensor
    """int32; the first so many have weights of their own, the other used ones share what they leave evenly."""
    entropy_T: torch.Tensor
    """float32; the teacher's full entropy in nats at ``temperature``."""
    temperature: float


@dataclass(frozen=True)
class HiddenTargets(SoftTargets):
    """The teacher's input to its lm_head; the student holds the head, fetched once."""

    hidden_TD: torch.Tensor
    """bfloat16."""


@dataclass(frozen=True)
class DenseTargets(SoftTargets):
    """Every log-probability in nats at ``temperature``; ``-inf`` for a token the teacher rules out."""

    logp_TV: torch.Tensor
    """float32."""
    temperature: float
