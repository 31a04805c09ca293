"""Examples on the way to a classifying teacher: what arrives is what was sent, or is refused by name."""

from dataclasses import replace

import numpy as np
import pytest

from kdscale.batch import Batch, ExampleBatch
from kdscale.errors import PayloadError, StreamError
from kdscale.spec import TargetSpec
from kdscale.stream.protocol import Header, Meaning, decode_request, encode_rows
from kdscale.stream.recording import row_key
from kdscale.targets.sampling import uniforms
from tests.classes import DIGITS, TOPICS, example_batch
from tests.conftest import PADDED_VOCAB

TEXTS = Meaning("teacher", "tokenizer", TOPICS, 32, "sequence-classification", PADDED_VOCAB)
IMAGES = Meaning("teacher", "pixels", DIGITS, 32, "image-classification", 64)


def received(batch: ExampleBatch, meaning: Meaning, vocab_size: int) -> Batch:
    """What a teacher of ``meaning`` makes of a request about ``batch``."""
    asked = Header("request", TargetSpec("dense", encoding="float32"), meaning, batch.inputs.shape[1], batch.number)
    rows, kind = encode_rows(batch), Header.opened(asked.opening("token"), "token")
    header, found = decode_request(asked.asking(), rows, kind, vocab_size)
    assert header == asked
    return found


@pytest.mark.parametrize(("family", "meaning"), [("bert", TEXTS), ("vit", IMAGES)])
def test_examples_arrive_as_they_were_sent(family: str, meaning: Meaning):
    batch = example_batch(family, seed=2)
    found = received(batch, meaning, meaning.vocab_size)
    assert isinstance(found, ExampleBatch)
    assert found.number == 2
    for ours, theirs in zip(found.planes(), batch.planes(), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert (found.num_tokens, len(found.labels()), found.num_rows) == (4, 4, 5)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("bert", {"labels_R": np.full(5, TOPICS, np.int32)}, "classes span 3..3; the teacher has 3"),
        ("bert", {"labels_R": np.full(5, -1, np.int32)}, "classes span -1..-1"),
        ("bert", {"inputs_RL": np.full((5, 24), PADDED_VOCAB, np.int32)}, "token ids span 320..320"),
        (
            "vit",
            {"inputs_RL": np.zeros((5, 81), np.uint8), "lengths_R": np.full(5, 81, np.int32)},
            "81 bytes.* reads 64",
        ),
    ],
)
def test_what_the_teacher_does_not_know_is_refused(family: str, change: dict, message: str):
    batch = replace(example_batch(family), **change)
    meaning = TEXTS if family == "bert" else IMAGES
    with pytest.raises(PayloadError, match=message):
        received(batch, meaning, meaning.vocab_size)


def test_images_and_texts_are_not_taken_for_each_other():
    batch = example_batch("bert")
    with pytest.raises(PayloadError, match="24 bytes"):
        received(batch, IMAGES, DIGITS)
    wide = replace(batch, inputs_RL=np.ones((5, 64), np.int32))
    with pytest.raises(PayloadError, match="asked for"):
        received(wide, IMAGES, DIGITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs_RL": np.zeros((5, 4), np.int64)}, "i4 .ids. or u1 .pixels."),
        ({"labels_R": np.zeros(4, np.int32)}, "labels_R is int32"),
        ({"lengths_R": np.zeros(5, np.int32)}, "lengths span 0..0; rows hold 1 to 24"),
        ({"lengths_R": np.full(5, 25, np.int32)}, "lengths span 25..25"),
        ({"trained_R": np.zeros(5, np.int32)}, "trained_R is int32"),
    ],
)
def test_malformed_batches_are_refused(change: dict, message: str):
    with pytest.raises(PayloadError, match=message):
        replace(example_batch("bert"), **change)


def test_rows_keep_their_identity_and_draws_wherever_they_stand():
    batch = example_batch("vit")
    assert len({row_key(row) for row in batch.rows()}) == 5
    assert row_key(batch.cut(slice(2, 4)).rows()[1]) == row_key(batch.rows()[3])
    drawn = uniforms(batch, seed=1)
    assert len(drawn) == batch.num_tokens == 4
    np.testing.assert_array_equal(drawn[1:], uniforms(batch.cut(slice(1, None)), seed=1))
    assert batch.untrained().num_tokens == 0
    assert (batch.work, batch.num_tokens_real) == ((5, 1), 5), "an image of 64 pixels is one patch"
    text = example_batch("bert")
    assert (text.work, text.num_tokens_real) == ((5, 24), int(text.lengths_R.sum()))


@pytest.mark.parametrize("said", [b"", b"{", b"[]", b'{"request": "a"}', b'{"request": "a", "number": 1e30}'])
def test_a_request_that_is_malformed_is_refused(said: bytes):
    batch, spec = example_batch("bert"), TargetSpec("dense", encoding="float32")
    kind = Header("", spec, TEXTS, batch.inputs.shape[1])
    with pytest.raises(StreamError, match="malformed request"):
        decode_request(said, encode_rows(batch), kind, TOPICS)
