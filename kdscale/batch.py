"""What crosses a process: rows of tokens or examples on the way to the teacher, soft targets on the way back.

R = rows, L = tokens (or pixels) in a row, T = positions trained on (row-major order), K = kept entries,
D = hidden size, N = layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
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
    routes_RL: np.ndarray | None = field(default=None, kw_only=True)
    """int8; which of several teachers a document goes to, -1 on padding. None: there is no choice."""

    def __post_init__(self) -> None:
        shape = self.ids_RL.shape
        planes = [("ids_RL", "i4"), ("segments_RL", "i4"), ("positions_RL", "i4"), ("predicts_RL", "?")]
        for name, dtype in [*planes, *([("routes_RL", "i1")] if self.routes_RL is not None else [])]:
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
    def inputs(self) -> np.ndarray:
        """What a row is, [R, L]; the first of ``planes``."""
        return self.ids_RL

    @property
    def asked(self) -> "TokenBatch":
        """What a teacher is asked about."""
        return self

    @property
    def trained(self) -> np.ndarray:
        """bool, by position."""
        return self.predicts_RL

    def planes(self) -> tuple[np.ndarray, ...]:
        """Everything that makes a row what a model reads; row by row."""
        return self.ids_RL, self.segments_RL, self.positions_RL, self.predicts_RL

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

    @property
    def work(self) -> tuple[int, int]:
        """(rows, tokens of a row) that a forward over it computes at most, padding included."""
        return self.num_rows, int(self.ids_RL.shape[1])

    def labels(self) -> np.ndarray:
        """The token each trained position predicts, int32 [T], in row-major order: the one place that shifts."""
        return self.ids_RL[:, 1:][self.predicts_RL[:, :-1]]

    def cut(self, rows: slice) -> Self:
        """The given rows, as a batch of their own."""
        names = ("ids_RL", "segments_RL", "positions_RL", "predicts_RL", "routes_RL")
        return replace(self, **{name: one[rows] for name in names if (one := getattr(self, name)) is not None})

    def rows(self) -> list[Self]:
        """Each row as a batch of its own."""
        return [self.cut(slice(row, row + 1)) for row in range(self.num_rows)]

    def untrained(self) -> Self:
        """The same rows, of which none counts."""
        return replace(self, predicts_RL=np.zeros_like(self.predicts_RL))

    def of_route(self, route: int) -> "TokenBatch":
        """The documents of one route, moved together at the left of their rows; rows that train on none are left out.

        Its trained positions are those of this batch that have the route, in their order.
        """
        assert self.routes_RL is not None
        mine_RL = self.routes_RL == route
        rows = (self.predicts_RL & mine_RL).any(1)
        mine_RL = mine_RL[rows]
        # As many columns as before: a row's draws follow from all of its ids, and may not depend on the rows beside it.
        columns = np.arange(mine_RL.shape[1], dtype=np.int32)
        order_RL = np.argsort(~mine_RL, axis=1, kind="stable")
        used_RL = columns < mine_RL.sum(1)[:, None]

        def moved(plane_RL: np.ndarray, padding: np.ndarray | int) -> np.ndarray:
            return np.where(used_RL, np.take_along_axis(plane_RL[rows], order_RL, 1), padding).astype(plane_RL.dtype)

        return TokenBatch(
            number=self.number,
            ids_RL=moved(self.ids_RL, 0),
            segments_RL=moved(self.segments_RL, PADDING_SEGMENT),
            positions_RL=moved(self.positions_RL, columns),
            predicts_RL=moved(self.predicts_RL, 0),
        )


_PATCH_PIXELS = 256
"""Of a patch of 16 x 16, as most vision transformers cut images."""


@dataclass(frozen=True)
class ExampleBatch:
    """Texts or images, one a row, each with its class: a row is one position, and predicts the class."""

    number: int
    """The batch number ``n`` this is (or was cut from)."""
    inputs_RL: np.ndarray
    """Of texts int32 token ids; of images uint8 pixels, channel after channel, line after line."""
    lengths_R: np.ndarray
    """int32; a row's ids beyond it are padding, and hold any valid id. Images fill their rows."""
    labels_R: np.ndarray
    """int32 classes."""
    trained_R: np.ndarray
    """bool; the rows trained on."""

    def __post_init__(self) -> None:
        if self.inputs_RL.ndim != 2 or self.inputs_RL.dtype not in (np.int32, np.uint8):
            raise PayloadError(
                f"inputs_RL is {self.inputs_RL.dtype}{self.inputs_RL.shape}; it must be i4 (ids) or u1 (pixels) in two"
                " dimensions"
            )
        for name, dtype in (("lengths_R", "i4"), ("labels_R", "i4"), ("trained_R", "?")):
            array = getattr(self, name)
            if array.shape != (self.num_rows,) or array.dtype != np.dtype(dtype):
                raise PayloadError(f"{name} is {array.dtype}{array.shape}; it must be {dtype}({self.num_rows},)")
        if self.num_rows and not 1 <= self.lengths_R.min() <= self.lengths_R.max() <= self.inputs_RL.shape[1]:
            raise PayloadError(
                f"lengths span {self.lengths_R.min()}..{self.lengths_R.max()}; rows hold 1 to {self.inputs_RL.shape[1]}"
            )

    @property
    def of_images(self) -> bool:
        return self.inputs_RL.dtype == np.uint8

    @property
    def inputs(self) -> np.ndarray:
        """See ``TokenBatch``."""
        return self.inputs_RL

    @property
    def asked(self) -> "ExampleBatch":
        """See ``TokenBatch``."""
        return self

    @property
    def trained(self) -> np.ndarray:
        """bool, by position."""
        return self.trained_R

    def planes(self) -> tuple[np.ndarray, ...]:
        """See ``TokenBatch``."""
        return self.inputs_RL, self.lengths_R, self.labels_R, self.trained_R

    @property
    def num_rows(self) -> int:
        return int(self.inputs_RL.shape[0])

    @property
    def num_tokens(self) -> int:
        """Positions trained on, T: examples."""
        return int(self.trained_R.sum())

    @property
    def num_tokens_real(self) -> int:
        """Tokens that are not padding; of images their number."""
        return self.num_rows if self.of_images else int(self.lengths_R.sum())

    @property
    def work(self) -> tuple[int, int]:
        """(rows, about how many tokens of a row) that a forward over it computes."""
        return self.num_rows, -(-self.inputs_RL.shape[1] // (_PATCH_PIXELS if self.of_images else 1))

    def labels(self) -> np.ndarray:
        """The class of each trained row, int32 [T]."""
        return self.labels_R[self.trained_R]

    def cut(self, rows: slice) -> "ExampleBatch":
        """The given rows, as a batch of their own."""
        names = ("inputs_RL", "lengths_R", "labels_R", "trained_R")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    def rows(self) -> "list[ExampleBatch]":
        """Each row as a batch of its own."""
        return [self.cut(slice(row, row + 1)) for row in range(self.num_rows)]

    def untrained(self) -> "ExampleBatch":
        """The same rows, of which none counts."""
        return replace(self, trained_R=np.zeros_like(self.trained_R))


Batch = TokenBatch | ExampleBatch


@dataclass(frozen=True)
class SoftTargets:
    """What the teacher says of T positions. Every tensor has one row per position."""

    labels_T: torch.Tensor
    """int32; the token id each position predicts, as the teacher saw it."""
    layers_TND: torch.Tensor | None = field(default=None, kw_only=True)
    """bfloat16; hidden states of the N layers that were asked for, in their order; none where none was."""

    def __len__(self) -> int:
        return int(self.labels_T.shape[0])

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """A copy with ``change`` applied to every tensor."""
        return replace(self, **{name: change(value) for name, value in self._tensors().items()})

    def cut(self, part: slice) -> Self:
        """The given positions."""
        return self.each(lambda tensor: tensor[part])

    def split(self, sizes: list[int]) -> Iterator[Self]:
        """All positions in parts of so many each."""
        if len(sizes) == 1:
            yield self
            return
        for part in zip(*(tensor.split(sizes) for tensor in self.tensors()), strict=True):
            yield self.with_tensors(part)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors in the order of the fields, labels first (``None`` is none)."""
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
    """int32, distinct in each row, the likeliest first. On their way to be sent they may be narrower, see
    ``targets.codec.narrow_ids``."""
    logp_TK: torch.Tensor
    """float32, <= 0; see ``targets.codec.narrow_logp``."""
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
