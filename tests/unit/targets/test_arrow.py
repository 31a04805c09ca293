"""The payload's Arrow form: round trips, widths, and every kind of damage refused."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.batch import DenseTargets, HiddenTargets, SampledTargets, SoftTargets, TopkTargets
from kdscale.errors import PayloadError
from kdscale.head import Head, HeadSpec
from kdscale.spec import ENCODINGS, TargetSpec
from kdscale.targets import arrow
from kdscale.targets.codec import decode_logp, encode_logp, pack_ids, quantize_rows, unpack_ids
from kdscale.targets.layout import row_bytes, schema, width
from kdscale.targets.payloads import make_targets

SPEC = TargetSpec("topk", k=5, temperature=2.0)


def make(tokens: int = 9, vocab: int = 50, spec: TargetSpec = SPEC, seed: int = 0) -> SoftTargets:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, 8, generator=generator), torch.randn(vocab + 3, 8, generator=generator)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    uniforms = np.random.default_rng(seed).random(tokens)
    return make_targets(hidden, Head(weight, None, HeadSpec(vocab)), labels, spec, uniforms)


def through_the_wire(batch: pa.RecordBatch) -> pa.RecordBatch:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


def back_and_forth(targets: SoftTargets, spec: TargetSpec, vocab: int) -> SoftTargets:
    wanted = schema(spec, vocab, 8)
    batch = arrow.encode(targets, spec, wanted, vocab)
    received = through_the_wire(batch)
    arrow.check(received, wanted)
    assert arrow.checksum(received, {"a": 1}) == arrow.checksum(batch, {"a": 1, "checksum": "x"})
    back = arrow.decode(received, spec, vocab)
    assert torch.equal(back.labels_T, targets.labels_T)
    return back


sizes = st.tuples(
    st.integers(0, 40), st.sampled_from([50, 300, 70_000, 140_000]), st.integers(1, 60), st.integers(0, 99)
)


@given(sizes, st.sampled_from([1.0, 1.5]), st.sampled_from(["float16", "uint8"]))
@settings(max_examples=60, deadline=None)
def test_topk_round_trip(size: tuple[int, int, int, int], temperature: float, encoding):
    tokens, vocab, k, seed = size
    spec = TargetSpec("topk", k=k, temperature=temperature, encoding=encoding)
    targets = make(tokens, vocab, spec, seed)
    back = back_and_forth(targets, spec, vocab)
    assert isinstance(targets, TopkTargets)
    assert isinstance(back, TopkTargets)
    assert torch.equal(back.ids_TK, targets.ids_TK)
    torch.testing.assert_close(back.tail_logp_T, targets.tail_logp_T, rtol=2**-11, atol=1e-7)
    torch.testing.assert_close(back.entropy_T, targets.entropy_T, rtol=2**-11, atol=1e-7)
    torch.testing.assert_close(back.shift_T, targets.shift_T)
    # Half a step on the grid of fourth roots is 2 / 255 of the fourth root's logarithm; float16 has 11 bits.
    allowed = {
        "float16": 4e-3 + 2**-11 * targets.logp_TK.abs(),
        "uint8": 0.02 + 2.1 / (255 * (targets.logp_TK / 4).exp()),
    }
    assert ((back.logp_TK - targets.logp_TK).abs() <= allowed[encoding]).all()
    torch.testing.assert_close(back.logp_TK.exp().sum(-1) + back.tail_logp_T.exp(), torch.ones(tokens))


@given(sizes, st.sampled_from(["threshold", "replacement"]), st.sampled_from(["float16", "uint8"]))
@settings(max_examples=60, deadline=None)
def test_sampled_round_trip(size: tuple[int, int, int, int], sampler, encoding):
    tokens, vocab, k, seed = size
    spec = TargetSpec("sampled", k=k, encoding=encoding, sampler=sampler, seed=1)
    targets = make(tokens, vocab, spec, seed)
    back = back_and_forth(targets, spec, vocab)
    assert isinstance(targets, SampledTargets)
    assert isinstance(back, SampledTargets)
    assert torch.equal(back.ids_TK, targets.ids_TK)
    assert torch.equal(back.kept_T, targets.kept_T)
    torch.testing.assert_close(back.weight_TK.sum(-1), torch.ones(tokens))
    steps = 0.0 if sampler == "replacement" else 4e-3 if encoding == "float16" else 0.05
    assert ((back.weight_TK - targets.weight_TK).abs() <= 1e-6 + steps * (targets.weight_TK + 0.2)).all()


@pytest.mark.parametrize("encoding", ENCODINGS["hidden"])
def test_hidden_round_trip(encoding):
    spec = TargetSpec("hidden", encoding=encoding)
    targets = make(spec=spec)
    back = back_and_forth(targets, spec, 50)
    assert isinstance(targets, HiddenTargets)
    assert isinstance(back, HiddenTargets)
    if encoding == "bfloat16":
        assert torch.equal(back.hidden_TD, targets.hidden_TD)
    else:
        step = targets.hidden_TD.float().abs().amax(-1, keepdim=True) / 127
        assert ((back.hidden_TD.float() - targets.hidden_TD.float()).abs() <= 0.51 * step + 2**-8 * step * 127).all()


def test_int8_rows_are_within_half_a_step():
    values = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1], [50], [0], [7]]
    )
    integers, scale = quantize_rows(values)
    assert ((integers.float() * scale[:, None] - values).abs() <= 0.5001 * scale[:, None]).all()


def test_dense_round_trip():
    spec = TargetSpec("dense", encoding="float32", temperature=2.0)
    targets = make(spec=spec)
    back = back_and_forth(targets, spec, 50)
    assert isinstance(targets, DenseTargets)
    assert isinstance(back, DenseTargets)
    assert torch.equal(back.logp_TV, targets.logp_TV)


def test_probability_codes():
    """All 256 codes stand for themselves, and a code's probability lies in the middle of its step."""
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encode_logp(decode_logp(codes))[1:], codes[1:])
    assert float(decode_logp(torch.tensor([255], dtype=torch.uint8))) == 0
    assert torch.isfinite(decode_logp(codes)).all()


@pytest.mark.parametrize("vocab", [50, 70_000, 20_000_000])
@pytest.mark.parametrize("payload", list(ENCODINGS))
def test_stated_bytes_are_the_bytes_sent(vocab: int, payload):
    for encoding in ENCODINGS[payload]:
        spec = TargetSpec(payload, k=5, encoding=encoding)
        assert row_bytes(spec, vocab, 8) == sum(width(field.type) for field in schema(spec, vocab, 8))
    assert row_bytes(TargetSpec("topk", k=64, encoding="uint8"), 49_152, 8) == 2 + 64 * 3 + 2 + 2


def test_an_encoding_of_another_payload_is_refused():
    with pytest.raises(PayloadError, match="payload topk cannot be encoded as int8; choose float16 or uint8"):
        schema(TargetSpec("topk", k=5, encoding="int8"), 50, 8)


@pytest.mark.parametrize("vocab", [65_536, 65_537, 131_073, 262_145, 1 << 24, (1 << 24) + 1])
def test_id_planes(vocab: int):
    ids = np.array([[0, vocab - 1, vocab // 2]], np.int32)
    np.testing.assert_array_equal(unpack_ids(pack_ids(ids, vocab), vocab), ids)


def test_one_flipped_byte_anywhere_is_seen():
    targets = make()
    wanted = schema(SPEC, 50, 8)
    batch = arrow.encode(targets, SPEC, wanted, 50)
    good = arrow.checksum(batch, {})
    for index, field in enumerate(wanted):
        raw = bytearray(batch.column(index).buffers()[1].to_pybytes())
        for place in (0, len(raw) // 2, len(raw) - 1):
            damaged = bytearray(raw)
            damaged[place] ^= 1
            columns = [batch.column(other) for other in range(len(wanted))]
            columns[index] = pa.Array.from_buffers(field.type, len(batch), [None, pa.py_buffer(bytes(damaged))])
            assert arrow.checksum(pa.RecordBatch.from_arrays(columns, schema=wanted), {}) != good
    assert arrow.checksum(batch, {"start": 1}) != good


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ids_TK", 50, "an id lies outside"),
        ("labels_T", -1, "label lies outside"),
        ("logp_TK", 0.5, "not finite or above 0"),
        ("logp_TK", float("nan"), "not finite or above 0"),
        ("tail_logp_T", 0.1, "tail log-mass is above 0"),
        ("tail_logp_T", float("nan"), "tail log-mass"),
        ("tail_logp_T", 0.0, "does not add up to 1"),
        ("entropy_T", float("inf"), "entropy is not finite"),
    ],
)
def test_impossible_values_are_refused(field: str, value: float, message: str):
    targets = make()
    column = getattr(targets, field).clone()
    column.view(-1)[3] = value
    wanted = schema(SPEC, 50, 8)
    with pytest.raises(PayloadError, match=message):
        arrow.decode(arrow.encode(replace(targets, **{field: column}), SPEC, wanted, 50), SPEC, 50)


def test_another_schema_is_refused():
    batch = arrow.encode(make(), SPEC, schema(SPEC, 50, 8), 50)
    for other in (TargetSpec("topk", k=5, temperature=1.0), TargetSpec("topk", k=6, temperature=2.0)):
        with pytest.raises(PayloadError, match="asked for"):
            arrow.check(batch, schema(other, 50, 8))


def test_nulls_are_refused():
    wanted = schema(SPEC, 50, 8)
    batch = arrow.encode(make(), SPEC, wanted, 50)
    columns = list(batch.columns)
    columns[0] = pa.array([None, *range(8)], pa.uint16())
    with pytest.raises(PayloadError, match=r"null"):
        arrow.check(pa.RecordBatch.from_arrays(columns, schema=wanted), wanted)


def test_schema_explains_itself():
    meta = json.loads(schema(SPEC, 50, 8).metadata[b"kdscale"])
    assert meta == {"version": 2, "vocab_size": 50, **SPEC.as_dict()}
