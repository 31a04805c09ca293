"""What crosses a process: token rows on the way to the teacher, soft targets on the way back.

R = rows, L = tokens in a row, T = positions trained on (row-major order), K = kept entries, D = hidden size.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from kdscale.errors import PayloadError

PADDING_SEGMENT = 0


@dataclass(frozen=True)
class TargetSpec:
    """What a request asks for at each trained position: its request identity, together with the packed tokens."""

    payload: Literal["topk", "hidden"]
    k: int = 0
    """Kept entries (``topk``)."""
    temperature: float = 1.0
    """Applied before truncation (``topk``); hidden states have none."""

    def as_dict(self) -> dict[str, str | int | float]:
        return {"payload": self.payload, "k": self.k, "temperature": self.temperature}


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
        return int(self.predicts_RL.sum())

    @property
    def num_tokens_real(self) -> int:
        """Tokens that are not padding: what a forward really reads."""
        return int((self.segments_RL != PADDING_SEGMENT).sum())

    def labels(self) -> np.ndarray:
        """The token each trained position predicts, int32 [T], in row-major order: the one place that shifts."""
        return self.ids_RL[:, 1:][self.predicts_RL[:, :-1]]

    def cut(self, rows: slice) -> "TokenBatch":
        """The given rows, as a batch of their own."""
        names = ("ids_RL", "segments_RL", "positions_RL", "predicts_RL")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


@dataclass(frozen=True)
class TopkTargets:
    """The K likeliest tokens per position and the mass of all others; log-probabilities in nats at ``temperature``."""

    temperature: float
    labels_T: torch.Tensor
    """int32; the token id each position predicts, as the teacher saw it."""
    ids_TK: torch.Tensor
    """int32, distinct in each row."""
    logp_TK: torch.Tensor
    """float32, <= 0."""
    tail_logp_T: torch.Tensor
    """float32; log of the mass outside the K entries, ``-inf`` where there is none."""
    entropy_T: torch.Tensor
    """float32; the teacher's full entropy in nats at ``temperature``."""

    def __len__(self) -> int:
        return int(self.labels_T.shape[0])


@dataclass(frozen=True)
class HiddenTargets:
    """The teacher's input to its lm_head; the student holds the head, fetched once."""

    labels_T: torch.Tensor
    """int32; the token id each position predicts, as the teacher saw it."""
    hidden_TD: torch.Tensor
    """bfloat16."""

    def __len__(self) -> int:
        return int(self.labels_T.shape[0])


SoftTargets = TopkTargets | HiddenTargets
