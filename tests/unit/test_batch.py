import numpy as np
import pytest

from kdscale.batch import TokenBatch
from kdscale.errors import PayloadError


def make(**changes: np.ndarray) -> TokenBatch:
    fields = {
        "ids_RL": np.array([[5, 6, 7, 8, 0]], np.int32),
        "segments_RL": np.array([[1, 1, 2, 2, 0]], np.int32),
        "positions_RL": np.array([[0, 1, 0, 1, 0]], np.int32),
        "predicts_RL": np.array([[True, False, True, False, False]]),
    }
    return TokenBatch(0, **(fields | changes))


def test_a_position_predicts_the_next_token():
    batch = make()
    assert batch.labels().tolist() == [6, 8]
    assert (batch.num_tokens, batch.num_tokens_real, batch.num_rows) == (2, 4, 1)


@pytest.mark.parametrize(
    ("predicts", "message"),
    [
        ([[False, True, False, False, False]], "across a document's end"),
        ([[False, False, False, True, False]], "across a document's end or from padding"),
        ([[False, False, False, False, True]], "last column"),
    ],
)
def test_predictions_outside_a_document_are_refused(predicts: list[list[bool]], message: str):
    with pytest.raises(PayloadError, match=message):
        make(predicts_RL=np.array(predicts))


def test_wrong_shapes_and_types_are_refused():
    with pytest.raises(PayloadError, match="segments_RL is int64"):
        make(segments_RL=np.zeros((1, 5), np.int64))
    with pytest.raises(PayloadError, match="positions_RL"):
        make(positions_RL=np.zeros((1, 4), np.int32))
