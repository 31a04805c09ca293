"""Batch ``n`` as a pure function of (corpus, config, n): the only cursor training has."""

from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from kdscale.batch import TokenBatch
from kdscale.data.packing import Packing, Row, build_row, pack
from kdscale.errors import DataError


class Order:
    """Which rows a batch takes: shuffled by (seed, epoch), the same for every number of ranks.

    Row ``j`` of batch ``n`` is row ``n * batch_rows + j`` of the endless sequence of epochs; each row stands once in
    every epoch, and a batch may straddle two.
    """

    def __init__(self, num_rows: int, batch_rows: int, seed: int) -> None:
        self.num_rows = num_rows
        self._batch_rows = batch_rows
        self._seed = seed
        self._permutation = lru_cache(maxsize=2)(self._permute)

    @property
    def steps_per_epoch(self) -> float:
        return self.num_rows / self._batch_rows

    def of_batch(self, number: int, rows: slice = slice(None)) -> list[int]:
        """The rows of batch ``number``, from 0, without end, or those at the places ``rows`` of it."""
        first = number * self._batch_rows
        places = (divmod(place, self.num_rows) for place in range(first, first + self._batch_rows)[rows])
        return [int(self._permutation(epoch)[index]) for epoch, index in places]

    def spread(self, most: int, rows_per_batch: int) -> list[np.ndarray]:
        """At most ``most`` rows (at least one), spread evenly, in batches."""
        wanted = min(self.num_rows, max(1, most))
        chosen = np.arange(wanted) * self.num_rows // wanted
        return [chosen[start : start + rows_per_batch] for start in range(0, wanted, rows_per_batch)]

    def _permute(self, epoch: int) -> np.ndarray:
        return np.random.Generator(np.random.Philox(key=[self._seed, epoch])).permutation(self.num_rows)


class Documents(Protocol):
    """What rows are made of; see ``corpus.Split``."""

    lengths: np.ndarray
    all_trained: bool
    routes: np.ndarray | None

    def document(self, index: int, tokens: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]: ...


class Loader:
    """Packed rows of one split, in the order of ``Order``.

    Raises:
        DataError: no row trains any token.
    """

    def __init__(self, split: Documents, packing: Packing, row_tokens: int, batch_rows: int, seed: int) -> None:
        self._split = split
        self._packing: Packing = packing
        self._row_tokens = row_tokens
        self._table = pack(split.lengths, row_tokens, packing)
        rows = range(len(self._table))
        self._rows = np.array(rows if split.all_trained else [r for r in rows if self._row(r).predicts.any()], np.int64)
        if not len(self._rows):
            raise DataError(
                f"no row of {row_tokens} tokens trains any token: all text is prompt, or documents are single tokens"
                " (data.loss_on=all trains on prompts too)"
            )
        self._order = Order(len(self._rows), batch_rows, seed)

    @property
    def num_rows(self) -> int:
        return self._order.num_rows

    @property
    def steps_per_epoch(self) -> float:
        return self._order.steps_per_epoch

    def batch(self, number: int, rows: slice = slice(None)) -> TokenBatch:
        """Batch ``number``, from 0, without end; given ``rows``, what ``cut`` makes of it, of which alone the text is read."""
        return self._batch(number, self._rows[self._order.of_batch(number, rows)])

    def heldout_batches(self, max_tokens: int, rows_per_batch: int) -> list[TokenBatch]:
        """Batches of rows spread evenly over the split, about ``max_tokens`` tokens in all (at least one row)."""
        spread = self._order.spread(max_tokens // self._row_tokens, rows_per_batch)
        return [self._batch(number, self._rows[chosen]) for number, chosen in enumerate(spread)]

    def _row(self, row: int) -> Row:
        table = self._table
        pieces = []
        for piece in range(int(table.starts[row]), int(table.starts[row + 1])):
            here = slice(int(table.offsets[piece]), int(table.offsets[piece] + table.lengths[piece]))
            pieces.append(self._split.document(int(table.documents[piece]), here))
        return build_row(pieces, self._row_tokens, self._packing)

    def _routes(self, row: int, segments: np.ndarray) -> np.ndarray:
        """int8 [L]; segments count the row's pieces from 1."""
        assert self._split.routes is not None
        pieces = self._table.documents[int(self._table.starts[row]) : int(self._table.starts[row + 1])]
        return np.concatenate([np.full(1, -1, np.int8), self._split.routes[pieces]])[segments]

    def _batch(self, number: int, rows: np.ndarray) -> TokenBatch:
        found = [self._row(int(row)) for row in rows]
        batch = stack(number, found)
        if self._split.routes is None:
            return batch
        routes = [self._routes(int(row), one.segments) for row, one in zip(rows, found, strict=True)]
        return replace(batch, routes_RL=np.stack(routes))


def stack(number: int, rows: list[Row]) -> TokenBatch:
    """Rows of one length as batch ``number``."""
    return TokenBatch(
        number=number,
        ids_RL=np.stack([row.ids for row in rows]),
        segments_RL=np.stack([row.segments for row in rows]),
        positions_RL=np.stack([row.positions for row in rows]),
        predicts_RL=np.stack([row.predicts for row in rows]),
    )
