"""Some rows of a batch are what ``cut`` makes of the whole, and are all that is read for them."""

from dataclasses import fields

import numpy as np
import pytest

from kdscale.batch import Batch, TokenBatch
from kdscale.data.loader import Loader
from kdscale.data.packing import Packing
from tests.properties.test_packing_properties import Documents

SIZES = [60, 9, 15, 24, 3, 31, 8, 8, 8, 40, 2, 17]
PARTS = [slice(0, 2), slice(2, 3), slice(3, 6)]


class Watched(Documents):
    """Remembers what was read of it."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(lengths)
        self.read: list[tuple[int, slice]] = []

    def document(self, index: int, tokens: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        self.read.append((index, tokens))
        return super().document(index, tokens)


def assert_same(batch: Batch, other: Batch) -> None:
    assert type(batch) is type(other)
    for field in fields(batch):
        one, two = getattr(batch, field.name), getattr(other, field.name)
        if isinstance(one, TokenBatch):
            assert_same(one, two)
        else:
            np.testing.assert_array_equal(one, two, strict=True, err_msg=field.name)


@pytest.mark.parametrize("packing", ["isolated", "joined", "off"])
@pytest.mark.parametrize("part", PARTS)
def test_some_rows_are_those_of_the_whole(packing: Packing, part: slice):
    loader = Loader(Documents(SIZES, untrained={1, 5}), packing, 24, 6, seed=3)
    for number in (0, 2, 9):
        assert_same(loader.batch(number, part), loader.batch(number).cut(part))


def test_of_other_rows_nothing_is_read():
    documents = Watched(SIZES)
    loader = Loader(documents, "off", 24, 6, seed=0)
    found = [loader.batch(1, part) for part in PARTS]
    assert [batch.num_rows for batch in found] == [2, 1, 3]
    assert len(documents.read) == 6
    assert max(tokens.stop - tokens.start for _, tokens in documents.read) == 24
