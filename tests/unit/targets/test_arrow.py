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
from kdscale.targets.decode import decode
from kdscale.targets.encode import encode
from kdscale.targets.layout import row_bytes, schema, schema_bytes
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
    batch = encode(targets, spec, wanted, vocab)
    received = through_the_wire(batch)
    arrow.check(received, wanted)
    raw = batch.schema.serialize().to_pybytes()
    assert raw == schema_bytes(spec, vocab, 8)
    assert arrow.checksum(received, raw, arrow.stated({"a": 1})) == arrow.checksum(batch, raw, arrow.stated({"a": 1}))
    back = decode(received, spec, vocab)
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
    # A root of code c is off by half a step, so its logarithm by 2 / c, and by 4 log(1.5) = 2.43 / c at most, at c = 1.5; float16
    # has 11 bits.
    allowed = {
        "float16": 4e-3 + 2**-11 * targets.logp_TK.abs(),
        "uint8": 0.04 + 2.45 / (255 * (targets.logp_TK / 4).exp()),
    }
    assert ((back.logp_TK - targets.logp_TK).abs() <= allowed[encoding]).all()
    torch.testing.assert_close(back.logp_TK.exp().sum(-1) + back.tail_logp_T.exp(), torch.ones(tokens))


@given(sizes, st.sampled_from([1.0, 1.5]))
@settings(max_examples=60, deadline=None)
def test_topk_in_four_bits_round_trip(size: tuple[int, int, int, int], temperature: float):
    """The same set of ids with the likeliest in front, and a distribution that is near."""
    tokens, vocab, k, seed = size
    spec = TargetSpec("topk", k=k, temperature=temperature, encoding="uint4")
    targets = make(tokens, vocab, spec, seed)
    back = back_and_forth(targets, spec, vocab)
    assert isinstance(targets, TopkTargets)
    assert isinstance(back, TopkTargets)
    assert torch.equal(back.ids_TK[:, :1], targets.ids_TK[:, :1])
    theirs, ours = targets.ids_TK.sort(-1), back.ids_TK.sort(-1)
    assert torch.equal(ours.values, theirs.values)
    logp, logq = targets.logp_TK.gather(1, theirs.indices), back.logp_TK.gather(1, ours.indices)
    ways = [torch.cat([kept, one.tail_logp_T[:, None]], 1) for kept, one in ((logp, targets), (logq, back))]
    torch.testing.assert_close(ways[1].exp().sum(-1), torch.ones(tokens))
    kl = torch.where(ways[0] > -torch.inf, ways[0].exp() * (ways[0] - ways[1]), 0.0).sum(-1)
    assert ((kl > -1e-5) & (kl < 0.05)).all()
    assert (torch.isinf(back.tail_logp_T) == (k >= vocab)).all()


@given(sizes, st.sampled_from(["threshold", "replacement"]), st.sampled_from(["float16", "uint8"]))
@settings(max_examples=60, deadline=None)
def test_sampled_round_trip(size: tuple[int, int, int, int], sampler, encoding):
    tokens, vocab, k, seed = size
    spec = TargetSpec("sampled", k=k, encoding=encoding, sampler=sampler, seed=1)
    targets = make(tokens, vocab, spec, seed)
    back = back_and_forth(targets, spec, vocab)
    assert isinstance(targets, SampledTargets)
    assert isinstance(back, SampledTargets)
    width = back.ids_TK.shape[1]
    assert width == int(targets.count_T.max()) if tokens else width == 0
    assert torch.equal(back.ids_TK, targets.ids_TK[:, :width])
    assert torch.equal(back.count_T, targets.count_T)
    assert torch.equal(back.kept_T, targets.kept_T)
    torch.testing.assert_close(back.weight_TK.sum(-1), torch.ones(tokens))
    steps = 0.0 if sampler == "replacement" else 4e-3 if encoding == "float16" else 0.05
    weight = targets.weight_TK[:, :width]
    assert ((back.weight_TK - weight).abs() <= 1e-6 + steps * (weight + 0.2)).all()
    assert sum(part.nbytes for part in SoftTargets.join([back, back]).tensors()) == 2 * sum(
        part.nbytes for part in back.tensors()
    )


def test_below_the_range_of_float16_is_least_of_it():
    spec = TargetSpec("topk", k=5)
    targets = make(spec=spec)
    assert isinstance(targets, TopkTargets)
    logp = targets.logp_TK.clone()
    logp[2, 4], logp[3, 4] = -1e6, -torch.inf
    tail = torch.log1p(-logp.exp().sum(-1))
    back = back_and_forth(replace(targets, logp_TK=logp, tail_logp_T=tail), spec, 50)
    assert isinstance(back, TopkTargets)
    assert torch.isfinite(back.logp_TK).all()
    assert (back.logp_TK[2:4, 4] < -65_000).all()
    nothing = replace(targets, logp_TK=logp.fill_(-torch.nan))
    with pytest.raises(PayloadError, match="not finite"):
        back_and_forth(nothing, spec, 50)


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


def test_dense_round_trip():
    spec = TargetSpec("dense", encoding="float32", temperature=2.0)
    targets = make(spec=spec)
    back = back_and_forth(targets, spec, 50)
    assert isinstance(targets, DenseTargets)
    assert isinstance(back, DenseTargets)
    assert torch.equal(back.logp_TV, targets.logp_TV)


@pytest.mark.parametrize("vocab", [50, 70_000])
@pytest.mark.parametrize("payload", list(ENCODINGS))
def test_stated_bytes_are_the_bytes_sent(vocab: int, payload):
    for encoding in ENCODINGS[payload]:
        spec = TargetSpec(payload, k=5, encoding=encoding)
        targets = make(40, vocab, spec)
        batch = encode(targets, spec, schema(spec, vocab, 8), vocab)
        size = row_bytes(spec, vocab, 8)
        assert batch.nbytes <= 40 * size + 8 if payload == "sampled" else batch.nbytes == 40 * size
    assert row_bytes(TargetSpec("topk", k=64, encoding="uint8"), 49_152, 8) == 2 + 64 * 3 + 2 + 2
    # Label, low bytes, a bitmap of 64 + 191 bits, half bytes, ends, which is first, tail, entropy.
    assert row_bytes(TargetSpec("topk", k=64, encoding="uint4"), 49_152, 8) == 2 + 64 + 32 + 32 + 2 + 1 + 1 + 2


def test_an_encoding_of_another_payload_is_refused():
    with pytest.raises(PayloadError, match="payload topk cannot be encoded as int8; choose float16 or uint8 or uint4"):
        schema(TargetSpec("topk", k=5, encoding="int8"), 50, 8)


def test_one_flipped_byte_anywhere_is_seen():
    targets = make()
    wanted = schema(SPEC, 50, 8)
    batch = encode(targets, SPEC, wanted, 50)
    raw_schema = schema_bytes(SPEC, 50, 8)
    good = arrow.checksum(batch, raw_schema, b"")
    for index, field in enumerate(wanted):
        raw = bytearray(batch.column(index).buffers()[1].to_pybytes())
        for place in (0, len(raw) // 2, len(raw) - 1):
            damaged = bytearray(raw)
            damaged[place] ^= 1
            columns = [batch.column(other) for other in range(len(wanted))]
            columns[index] = pa.Array.from_buffers(field.type, len(batch), [None, pa.py_buffer(bytes(damaged))])
            damaged_batch = pa.RecordBatch.from_arrays(columns, schema=wanted)
            assert arrow.checksum(damaged_batch, raw_schema, b"") != good
    assert arrow.checksum(batch, raw_schema, arrow.stated({"start": 1})) != good
    assert arrow.checksum(batch, raw_schema + b"x", b"") != good


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
        decode(encode(replace(targets, **{field: column}), SPEC, wanted, 50), SPEC, 50)


HOSTILE = [
    TargetSpec("topk", k=5, encoding="float16"),
    TargetSpec("topk", k=7, encoding="uint8"),
    *(TargetSpec("topk", k=k, encoding="uint4") for k in (1, 5, 60)),
    TargetSpec("sampled", k=6, encoding="uint8"),
    TargetSpec("sampled", k=6, encoding="float16"),
    TargetSpec("sampled", k=6, sampler="replacement"),
]


def test_a_position_whose_entries_have_no_mass_is_refused():
    """Beside a tail of all: its entries could be scaled up to anything."""
    targets = make()
    nothing = replace(targets, logp_TK=torch.full_like(targets.logp_TK, -65504.0), tail_logp_T=targets.tail_logp_T * 0)
    with pytest.raises(PayloadError, match="no entry of a position has any mass"):
        decode(encode(nothing, SPEC, schema(SPEC, 50, 8), 50), SPEC, 50)


@given(st.sampled_from(HOSTILE), st.sampled_from([50, 5_000, 70_000]), st.integers(1, 9), st.data())
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_refused_or_a_distribution(spec: TargetSpec, vocab: int, tokens: int, data: st.DataObject):
    """Arrow-valid bytes of a sender that means ill, or of one that counts wrong: what gets through is what it says it is."""
    batch = encode(make(tokens, vocab, spec), spec, schema(spec, vocab, 8), vocab)
    hostile = data.draw(st.sets(st.integers(0, len(batch.columns) - 1), min_size=1))
    random = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    columns = list(batch.columns)
    for index in hostile:
        kind, (_, *buffers) = columns[index].type, columns[index].buffers()
        size = random.integers(0, 3 * len(buffers[-1]) + 1) if len(buffers) == 2 else len(buffers[-1])
        raw = [pa.py_buffer((random.integers(0, 256, size) & random.choice([255, 15, 129, 0])).astype(np.uint8))]
        if len(buffers) == 2:
            cuts = np.sort(random.integers(0, size + 1, tokens - 1))
            raw = [pa.py_buffer(np.concatenate([[0], cuts, [size]]).astype(np.int32)), *raw]
        columns[index] = pa.Array.from_buffers(kind, tokens, [None, *raw])
    batch = pa.RecordBatch.from_arrays(columns, schema=batch.schema)
    arrow.check(batch, schema(spec, vocab, 8))
    try:
        found = decode(batch, spec, vocab)
    except PayloadError:
        return
    assert isinstance(found, TopkTargets | SampledTargets)
    assert ((found.ids_TK >= 0) & (found.ids_TK < vocab)).all()
    assert torch.isfinite(found.entropy_T).all()
    if isinstance(found, TopkTargets):
        assert torch.isfinite(found.logp_TK).all()
        mass = found.logp_TK.exp().sum(-1) + found.tail_logp_T.exp()
    else:
        mass = found.weight_TK.sum(-1)
        assert (found.weight_TK >= 0).all()
        assert (found.kept_T <= found.count_T).all()
    assert ((mass - 1).abs() < 0.03).all()


@pytest.mark.parametrize("k", [96, 1000])
@pytest.mark.parametrize("payload", ["topk", "sampled"])
@pytest.mark.parametrize("encoding", ["float16", "uint8"])
def test_an_even_distribution_is_none_of_nonsense(payload, encoding, k: int):
    """Where every entry is rounded alike, as of a teacher at a high temperature."""
    spec = TargetSpec(payload, k=k, temperature=1e6, encoding=encoding)
    targets = make(9, k, spec)
    back = back_and_forth(targets, spec, k)
    assert isinstance(back, TopkTargets | SampledTargets)
    assert back.ids_TK.shape == (9, k)
    p_TK = back.logp_TK.exp() if isinstance(back, TopkTargets) else back.weight_TK
    torch.testing.assert_close(p_TK, torch.full((9, k), 1 / k), rtol=1e-3, atol=0)


def test_weights_of_which_all_are_named_add_up():
    """Half of the mass lost in a row that leaves none to others."""
    spec = TargetSpec("sampled", k=6, encoding="float16")
    targets = make(4, 6, spec)
    assert isinstance(targets, SampledTargets)
    wrong = replace(targets, weight_TK=targets.weight_TK / 2, kept_T=targets.count_T)
    with pytest.raises(PayloadError, match="does not add up to 1"):
        decode(encode(wrong, spec, schema(spec, 6, 8), 6), spec, 6)


def test_another_schema_is_refused():
    batch = encode(make(), SPEC, schema(SPEC, 50, 8), 50)
    for other in (TargetSpec("topk", k=5, temperature=1.0), TargetSpec("topk", k=6, temperature=2.0)):
        with pytest.raises(PayloadError, match="asked for"):
            arrow.check(batch, schema(other, 50, 8))


def test_nulls_are_refused():
    wanted = schema(SPEC, 50, 8)
    batch = encode(make(), SPEC, wanted, 50)
    columns = list(batch.columns)
    columns[0] = pa.array([None, *range(8)], pa.uint16())
    with pytest.raises(PayloadError, match=r"null"):
        arrow.check(pa.RecordBatch.from_arrays(columns, schema=wanted), wanted)


def test_schema_explains_itself():
    meta = json.loads(schema(SPEC, 50, 8).metadata[b"kdscale"])
    assert meta == {"version": 4, "vocab_size": 50, **SPEC.as_dict()}
