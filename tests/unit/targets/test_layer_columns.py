"""Hidden states of layers as further columns: of any payload, checked like the others, and absent where none was asked for."""

import json
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from kdscale.batch import SoftTargets
from kdscale.errors import PayloadError
from kdscale.spec import ENCODINGS, TargetSpec
from kdscale.targets import arrow
from kdscale.targets.decode import decode
from kdscale.targets.encode import encode
from kdscale.targets.layout import row_bytes, schema, schema_bytes
from kdscale.targets.payloads import with_layers
from tests.unit.targets.test_arrow import make, through_the_wire

LAYERS = (0, 3, 7)


def asked(payload: str, layers_encoding: str = "bfloat16") -> TargetSpec:
    encoding = ENCODINGS[payload][0]  # type: ignore[index]
    return TargetSpec.of(
        {"payload": payload, "k": 5, "encoding": encoding, "layers": LAYERS, "layers_encoding": layers_encoding}
    )


def made(spec: TargetSpec, tokens: int = 9) -> SoftTargets:
    generator = torch.Generator().manual_seed(1)
    states = [10**n * torch.randn(tokens, 8, generator=generator) for n in range(len(LAYERS))]
    return with_layers(make(tokens, 50, spec), states)


@pytest.mark.parametrize("encoding", ENCODINGS["hidden"])
@pytest.mark.parametrize("payload", list(ENCODINGS))
def test_round_trip(payload: str, encoding: str):
    spec = asked(payload, encoding)
    targets, wanted = made(spec), schema(spec, 50, 8)
    batch = encode(targets, spec, wanted, 50)
    received = through_the_wire(batch)
    arrow.check(received, wanted)
    back, plain = decode(received, spec, 50), decode(*without_layers(batch, spec), 50)
    assert back.layers_TND.dtype == torch.bfloat16
    if encoding == "bfloat16":
        assert torch.equal(back.layers_TND, targets.layers_TND)
    else:
        whole = targets.layers_TND.float().abs().amax(-1, keepdim=True)
        assert ((back.layers_TND.float() - targets.layers_TND.float()).abs() <= whole * (0.51 / 127 + 2**-8)).all()
    # What the payload itself carries is what it would carry alone.
    for ours, alone in zip(replace(back, layers_TND=None).tensors(), plain.tensors(), strict=True):
        assert torch.equal(ours, alone)
    if payload != "sampled":
        assert batch.nbytes == 9 * row_bytes(spec, 50, 8)
    assert row_bytes(spec, 50, 8) - row_bytes(replace(spec, layers=()), 50, 8) == 3 * (
        16 if encoding == "bfloat16" else 8 + 4
    )


def without_layers(batch: pa.RecordBatch, spec: TargetSpec) -> tuple[pa.RecordBatch, TargetSpec]:
    alone = replace(spec, layers=())
    wanted = schema(alone, 50, 8)
    return pa.RecordBatch.from_arrays([batch.column(name) for name in wanted.names], schema=wanted), alone


def test_cut_and_joined_like_any_other():
    spec = asked("topk")
    targets = made(spec)
    joined = SoftTargets.join([targets.cut(slice(0, 4)), targets.cut(slice(4, 9))])
    assert torch.equal(joined.layers_TND, targets.layers_TND)
    assert len(made(spec, tokens=0).layers_TND) == 0


def test_damage_is_seen():
    spec = asked("topk", "int8")
    batch = encode(made(spec), spec, schema(spec, 50, 8), 50)
    raw = schema_bytes(spec, 50, 8)
    for name in ("layer_3", "layer_3_scale"):
        column = batch.column(name)
        damaged = bytearray(column.buffers()[1].to_pybytes())
        damaged[-1] ^= 1
        columns = {one: batch.column(one) for one in batch.schema.names}
        columns[name] = pa.Array.from_buffers(column.type, len(batch), [None, pa.py_buffer(bytes(damaged))])
        other = pa.RecordBatch.from_arrays(list(columns.values()), schema=batch.schema)
        assert arrow.checksum(other, raw, b"") != arrow.checksum(batch, raw, b""), name


@pytest.mark.parametrize("encoding", ENCODINGS["hidden"])
def test_what_is_not_finite_is_refused(encoding: str):
    spec = asked("topk", encoding)
    targets = made(spec)
    targets.layers_TND[4, 1, 2] = torch.inf
    with pytest.raises(PayloadError, match="a hidden state is not finite"):
        decode(encode(targets, spec, schema(spec, 50, 8), 50), spec, 50)


def test_a_request_without_layers_is_what_it_always_was():
    spec = TargetSpec("topk", k=5)
    assert "layers" not in json.loads(schema(spec, 50, 8).metadata[b"kdscale"])
    assert "layers" not in spec.as_dict()
    layered = asked("topk")
    assert json.loads(schema(layered, 50, 8).metadata[b"kdscale"])["layers"] == [0, 3, 7]
    assert TargetSpec.of(json.loads(json.dumps(layered.as_dict()))) == layered
    with pytest.raises(PayloadError, match="asked for"):
        arrow.check(encode(made(layered), layered, schema(layered, 50, 8), 50), schema(spec, 50, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (3, 1)}, "name each once, ascending"),
        ({"layers": (-1,)}, "from 0 on"),
        ({"layers": (1,), "layers_encoding": "uint4"}, "layers cannot be encoded as uint4; choose bfloat16 or int8"),
    ],
)
def test_what_cannot_be_asked_for(fields: dict, message: str):
    with pytest.raises(PayloadError, match=message):
        schema(TargetSpec("topk", k=5, **fields), 50, 8)
