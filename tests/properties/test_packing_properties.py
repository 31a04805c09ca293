"""Packing and loading over random documents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.batch import TokenBatch
from kdscale.data.loader import Loader
from kdscale.data.packing import Packing, build_row, pack
from kdscale.errors import DataError


class Documents:
    """A split in memory: document ``d`` holds the ids ``1000 d, 1000 d + 1, ...``, with a mask."""

    routes: np.ndarray | None = None

    def __init__(self, lengths: list[int], untrained: set[int] = frozenset()) -> None:
        self.lengths = np.array(lengths, np.int64)
        self.all_trained = not untrained
        self._untrained = untrained

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int, tokens: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        length = int(self.lengths[index])
        trained = np.full(length, index not in self._untrained)
        return (np.arange(length, dtype=np.int32) + 1000 * index)[tokens], trained[tokens]


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=30)
packings = st.sampled_from(["isolated", "joined", "off"])


def batch_of(documents: Documents, packing: Packing, columns: int) -> TokenBatch:
    loader = Loader(documents, packing, columns, 1, seed=0)
    rows = [loader.batch(number) for number in range(loader.num_rows)]
    names = ("ids_RL", "segments_RL", "positions_RL", "predicts_RL")
    return TokenBatch(0, **{name: np.concatenate([getattr(row, name) for row in rows]) for name in names})


@given(lengths, packings, st.integers(2, 33))
@settings(max_examples=60, deadline=None)
def test_every_token_stands_once_but_for_lone_last_ones(sizes: list[int], packing: Packing, columns: int):
    documents = Documents(sizes)
    try:
        batch = batch_of(documents, packing, columns)
    except DataError:
        assert max(sizes) == 1
        return
    found = sorted(batch.ids_RL[batch.segments_RL != 0].tolist())
    expected = []
    for index, size in enumerate(sizes):
        kept = size - 1 if size % columns == 1 else size
        expected += [1000 * index + token for token in range(kept)]
    assert found == sorted(expected)


@given(lengths, st.integers(2, 33))
@settings(max_examples=60, deadline=None)
def test_isolated_predictions_stay_in_the_document_and_positions_count(sizes: list[int], columns: int):
    if max(sizes) == 1:
        return
    batch = batch_of(Documents(sizes), "isolated", columns)
    here, after = batch.ids_RL[:, :-1], batch.ids_RL[:, 1:]
    predicts = batch.predicts_RL[:, :-1]
    assert (after[predicts] == here[predicts] + 1).all()
    # Within a segment positions count from 0 by 1; every segment change restarts them.
    same = batch.segments_RL[:, 1:] == batch.segments_RL[:, :-1]
    assert (np.diff(batch.positions_RL, axis=1)[same] == 1).all()
    assert (batch.positions_RL[:, 1:][~same] == 0).all()
    assert (batch.positions_RL[:, 0] == 0).all()
    # Every token but a piece's last predicts.
    real = batch.segments_RL[:, :-1] != 0
    assert (predicts == (same & real)).all()


@given(lengths, st.integers(2, 33), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_documents_pieces_do_not_depend_on_its_neighbours(sizes: list[int], columns: int, chosen: int):
    index = chosen % len(sizes)
    together = pack(np.array(sizes), columns, "isolated")
    alone = pack(np.array(sizes[index : index + 1]), columns, "isolated")
    mine = together.documents == index
    pieces = sorted(zip(together.offsets[mine].tolist(), together.lengths[mine].tolist(), strict=True))
    assert pieces == sorted(zip(alone.offsets.tolist(), alone.lengths.tolist(), strict=True))


@given(st.lists(st.integers(2, 40), min_size=3, max_size=20), st.integers(1, 4), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_an_epoch_is_a_permutation_and_batches_are_pure(sizes: list[int], rows: int, seed: int):
    loader = Loader(Documents(sizes), "isolated", 16, rows, seed)
    epochs = 2
    needed = -(-loader.num_rows * epochs // rows)
    ids = np.concatenate([loader.batch(number).ids_RL for number in range(needed)])[: loader.num_rows * epochs]
    per_epoch = [sorted(map(tuple, part.tolist())) for part in np.split(ids, epochs)]
    assert per_epoch[0] == per_epoch[1]
    again = Loader(Documents(sizes), "isolated", 16, rows, seed)
    for number in (needed - 1, 0):
        np.testing.assert_array_equal(again.batch(number).ids_RL, loader.batch(number).ids_RL)


@given(st.lists(st.integers(2, 16), min_size=1, max_size=60))
@settings(max_examples=40, deadline=None)
def test_rows_are_filled_well(sizes: list[int]):
    table = pack(np.array(sizes), 16, "isolated")
    # Best fit decreasing needs at most 11/9 of the optimum plus 1 (Johnson 1973).
    assert len(table) <= 11 / 9 * -(-sum(sizes) // 8) + 1
    used = [int(table.lengths[a:b].sum()) for a, b in zip(table.starts, table.starts[1:], strict=False)]
    assert max(used) <= 16


def test_joined_rows_are_one_segment():
    row = build_row([(np.array([5, 6]), np.array([True, True])), (np.array([7]), np.array([True]))], 5, "joined")
    assert row.segments.tolist() == [1, 1, 1, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 1]
    assert row.predicts.tolist() == [True, True, False, False, False]


def test_rows_that_train_nothing_are_left_out():
    loader = Loader(Documents([8, 8, 8], untrained={1}), "off", 8, 1, seed=0)
    assert loader.num_rows == 2
    with pytest.raises(DataError, match="no row of 8 tokens trains any token"):
        Loader(Documents([8], untrained={0}), "off", 8, 1, seed=0)


def test_held_out_rows_are_spread_over_the_split():
    loader = Loader(Documents([8] * 100), "off", 8, 1, seed=0)
    batches = loader.heldout_batches(max_tokens=80, rows_per_batch=4)
    firsts = np.concatenate([batch.ids_RL[:, 0] for batch in batches]) // 1000
    assert firsts.tolist() == list(range(0, 100, 10))
    assert [batch.num_rows for batch in batches] == [4, 4, 2]
