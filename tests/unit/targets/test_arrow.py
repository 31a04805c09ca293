"""The payload's Arrow form: round trips, widths, and every kind of damage refused."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.batch import HiddenTargets, TargetSpec, TopkTargets
from kdscale.errors import PayloadError
from kdscale.head import Head, HeadSpec
from kdscale.targets import arrow
from kdscale.targets.codec import pack_ids, topk_bytes, unpack_ids
from kdscale.targets.payloads import topk_targets

SPEC = TargetSpec("topk", k=5, temperature=2.0)


def make(tokens: int = 9, vocab: int = 50, spec: TargetSpec = SPEC, seed: int = 0) -> TopkTargets:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, 8, generator=generator), torch.randn(vocab + 3, 8, generator=generator)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    return topk_targets(hidden, Head(weight, None, HeadSpec(vocab)), labels, k=spec.k, temperature=spec.temperature)


def through_the_wire(batch: pa.RecordBatch) -> pa.RecordBatch:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


@given(st.integers(0, 40), st.sampled_from([50, 300, 70_000]), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_topk_round_trip(tokens: int, vocab: int, k: int, seed: int):
    spec = TargetSpec("topk", k=k, temperature=1.5)
    targets = make(tokens, vocab, spec, seed)
    schema = arrow.schema(spec, vocab, 8)
    batch = arrow.encode(targets, schema, vocab)
    received = through_the_wire(batch)
    arrow.check(received, schema)
    assert arrow.checksum(received, {"a": 1}) == arrow.checksum(batch, {"a": 1, "checksum": "x"})
    back = arrow.decode(received, spec, vocab)
    assert isinstance(back, TopkTargets)
    torch.testing.assert_close(back.ids_TK, targets.ids_TK)
    torch.testing.assert_close(back.labels_T, targets.labels_T)
    torch.testing.assert_close(back.tail_logp_T, targets.tail_logp_T)
    torch.testing.assert_close(back.entropy_T, targets.entropy_T)
    torch.testing.assert_close(back.logp_TK, targets.logp_TK, rtol=2**-11, atol=1e-7)


def test_hidden_round_trip():
    generator = torch.Generator().manual_seed(0)
    targets = HiddenTargets(torch.arange(4, dtype=torch.int32), torch.randn(4, 6, generator=generator).bfloat16())
    spec = TargetSpec("hidden")
    schema = arrow.schema(spec, 50, 6)
    back = arrow.decode(through_the_wire(arrow.encode(targets, schema, 50)), spec, 50)
    assert isinstance(back, HiddenTargets)
    assert torch.equal(back.hidden_TD, targets.hidden_TD)


@pytest.mark.parametrize("vocab", [50, 70_000, 20_000_000])
def test_stated_bytes_are_the_bytes_sent(vocab: int):
    widths = [
        field.type.byte_width if pa.types.is_fixed_size_binary(field.type) else field.type.bit_width // 8
        for field in arrow.schema(TargetSpec("topk", k=5), vocab, 8)
    ]
    assert topk_bytes(5, vocab) == sum(widths)


@pytest.mark.parametrize("vocab", [65_536, 65_537, 1 << 24, (1 << 24) + 1])
def test_id_planes(vocab: int):
    ids = np.array([[0, vocab - 1, vocab // 2]], np.int32)
    np.testing.assert_array_equal(unpack_ids(pack_ids(ids, vocab)), ids)


def test_one_flipped_byte_anywhere_is_seen():
    targets = make()
    schema = arrow.schema(SPEC, 50, 8)
    batch = arrow.encode(targets, schema, 50)
    good = arrow.checksum(batch, {})
    for index, field in enumerate(schema):
        raw = bytearray(batch.column(index).buffers()[1].to_pybytes())
        for place in (0, len(raw) // 2, len(raw) - 1):
            damaged = bytearray(raw)
            damaged[place] ^= 1
            columns = [batch.column(other) for other in range(len(schema))]
            columns[index] = pa.Array.from_buffers(field.type, len(batch), [None, pa.py_buffer(bytes(damaged))])
            assert arrow.checksum(pa.RecordBatch.from_arrays(columns, schema=schema), {}) != good
    assert arrow.checksum(batch, {"start": 1}) != good


def replaced(targets: TopkTargets, **fields: torch.Tensor) -> TopkTargets:
    values = {name: getattr(targets, name) for name in targets.__dataclass_fields__}
    return TopkTargets(**(values | fields))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ids_TK", 50, "kept id lies outside"),
        ("labels_T", -1, "label lies outside"),
        ("logp_TK", 0.5, "not finite or above 0"),
        ("logp_TK", float("nan"), "not finite or above 0"),
        ("tail_logp_T", 0.1, "tail log-mass is above 0"),
        ("tail_logp_T", float("nan"), "tail log-mass"),
        ("tail_logp_T", 0.0, "do not add up to 1"),
        ("entropy_T", float("inf"), "entropy is not finite"),
    ],
)
def test_impossible_values_are_refused(field: str, value: float, message: str):
    targets = make()
    column = getattr(targets, field).clone()
    column.view(-1)[3] = value
    schema = arrow.schema(SPEC, 50, 8)
    with pytest.raises(PayloadError, match=message):
        arrow.decode(arrow.encode(replaced(targets, **{field: column}), schema, 50), SPEC, 50)


def test_another_schema_is_refused():
    batch = arrow.encode(make(), arrow.schema(SPEC, 50, 8), 50)
    for other in (TargetSpec("topk", k=5, temperature=1.0), TargetSpec("topk", k=6, temperature=2.0)):
        with pytest.raises(PayloadError, match="asked for"):
            arrow.check(batch, arrow.schema(other, 50, 8))


def test_nulls_are_refused():
    schema = arrow.schema(SPEC, 50, 8)
    batch = arrow.encode(make(), schema, 50)
    columns = list(batch.columns)
    columns[0] = pa.array([None, *range(8)], pa.int32())
    with pytest.raises(PayloadError, match=r"null"):
        arrow.check(pa.RecordBatch.from_arrays(columns, schema=schema), schema)


def test_schema_explains_itself():
    meta = json.loads(arrow.schema(SPEC, 50, 8).metadata[b"kdscale"])
    assert meta == {"version": 1, "vocab_size": 50, "payload": "topk", "k": 5, "temperature": 2.0}
