"""Soft targets as Arrow record batches: schema, checks, checksum. The same on the wire and on disk.

Every column is fixed-width and without nulls, one value per position; a plane of K entries is one fixed-size binary.
T = positions, K = kept entries, D = hidden size.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash

from kdscale.batch import HiddenTargets, SoftTargets, TargetSpec, TopkTargets
from kdscale.errors import PayloadError
from kdscale.targets.codec import high_bytes, pack_ids, unpack_ids

VERSION = 1
# float16 rounds a log-probability by at most 2^-11 of itself; the kept mass may exceed 1 by that much.
_MASS_EPS = 2e-2


def schema(spec: TargetSpec, vocab_size: int, hidden_size: int) -> pa.Schema:
    """The Arrow schema of a payload. Its metadata says what the numbers mean, so a recording explains itself."""
    meta = {"kdscale": json.dumps({"version": VERSION, "vocab_size": vocab_size, **spec.as_dict()}, sort_keys=True)}
    fields = [pa.field("label", pa.int32(), nullable=False)]
    match spec.payload:
        case "topk":
            k = min(spec.k, vocab_size)
            fields.append(pa.field("ids_low", pa.binary(2 * k), nullable=False))
            if high_bytes(vocab_size):
                fields.append(pa.field("ids_high", pa.binary(high_bytes(vocab_size) * k), nullable=False))
            fields.append(pa.field("logp", pa.binary(2 * k), nullable=False))
            fields.append(pa.field("tail_logp", pa.float32(), nullable=False))
            fields.append(pa.field("entropy", pa.float32(), nullable=False))
        case "hidden":
            fields.append(pa.field("hidden", pa.binary(2 * hidden_size), nullable=False))
    return pa.schema(fields, metadata=meta)


def encode(targets: SoftTargets, target_schema: pa.Schema, vocab_size: int) -> pa.RecordBatch:
    """The record batch of ``targets`` under ``target_schema``."""
    columns: list[Any] = [targets.labels_T.numpy()]
    match targets:
        case TopkTargets():
            columns += pack_ids(targets.ids_TK.numpy(), vocab_size)
            # A log-probability below float16's range stands for none at all: keep it finite.
            logp = targets.logp_TK.clamp_min(torch.finfo(torch.float16).min).half()
            columns += [logp.numpy(), targets.tail_logp_T.numpy(), targets.entropy_T.numpy()]
        case HiddenTargets():
            columns.append(targets.hidden_TD.contiguous().view(torch.int16).numpy())
    return record_batch(columns, target_schema)


def record_batch(columns: list[np.ndarray], batch_schema: pa.Schema) -> pa.RecordBatch:
    """A record batch over the bytes of ``columns``, one array (rows first) per field."""
    arrays = [
        pa.Array.from_buffers(field.type, len(column), [None, pa.py_buffer(np.ascontiguousarray(column))])
        for field, column in zip(batch_schema, columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=batch_schema)


def plane(batch: pa.RecordBatch, name: str, dtype: str, width: int | None = None) -> np.ndarray:
    """Column ``name`` as a fresh, aligned, writable array [rows] or [rows, width]; buffers may arrive misaligned."""
    column = batch.column(name)
    raw = memoryview(_payload(column)).cast("B") if len(column) else b""
    flat = np.frombuffer(bytes(raw), dtype=dtype).copy()
    return flat if width is None else flat.reshape(len(column), width)


def check(batch: pa.RecordBatch, expected: pa.Schema) -> None:
    """Refuse a batch that Arrow could crash on or that is not of the schema asked for.

    Raises:
        PayloadError: other schema, nulls, or buffers shorter than declared.
    """
    if not batch.schema.equals(expected, check_metadata=True):
        raise PayloadError(f"answer has schema {_line(batch.schema)}; asked for {_line(expected)}")
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise PayloadError(f"answer is not valid Arrow data: {error}") from error
    for column, field in zip(batch.columns, batch.schema, strict=True):
        if column.null_count:
            raise PayloadError(f"column {field.name} holds {column.null_count} nulls; none are allowed")


def checksum(batch: pa.RecordBatch, metadata: dict[str, Any]) -> str:
    """xxh3 of all values, the schema and ``metadata`` (without its own ``checksum``), as hex."""
    digest = xxhash.xxh3_128()
    digest.update(batch.schema.serialize())
    stated = {key: value for key, value in metadata.items() if key != "checksum"}
    digest.update(json.dumps(stated, sort_keys=True).encode())
    for column in batch.columns:
        if len(column):
            digest.update(_payload(column))
    return digest.hexdigest()


def decode(batch: pa.RecordBatch, spec: TargetSpec, vocab_size: int) -> SoftTargets:
    """The soft targets in a batch that passed ``check`` and whose checksum agreed.

    Raises:
        PayloadError: ids outside the vocabulary, log-probabilities that are not finite or above 0, mass above 1.
    """
    labels = plane(batch, "label", "<i4")
    _refuse(((labels < 0) | (labels >= vocab_size)).any(), f"a label lies outside the vocabulary of {vocab_size}")
    match spec.payload:
        case "hidden":
            width = batch.schema.field("hidden").type.byte_width // 2
            hidden = torch.from_numpy(plane(batch, "hidden", "<i2", width)).view(torch.bfloat16)
            _refuse(not torch.isfinite(hidden).all(), "a hidden state is not finite")
            return HiddenTargets(labels_T=torch.from_numpy(labels), hidden_TD=hidden)
        case "topk":
            k = min(spec.k, vocab_size)
            planes = [plane(batch, "ids_low", "<u2", k)]
            if high_bytes(vocab_size):
                planes.append(plane(batch, "ids_high", f"<u{high_bytes(vocab_size)}", k))
            ids = unpack_ids(planes)
            _refuse((ids >= vocab_size).any(), f"a kept id lies outside the vocabulary of {vocab_size}")
            logp = torch.from_numpy(plane(batch, "logp", "<f2", k)).float()
            tail = torch.from_numpy(plane(batch, "tail_logp", "<f4"))
            entropy = torch.from_numpy(plane(batch, "entropy", "<f4"))
            _refuse(not (torch.isfinite(logp) & (logp <= 0)).all(), "a log-probability is not finite or above 0")
            _refuse(not (tail <= 0).all(), "a tail log-mass is above 0 or not a number")
            _refuse(not torch.isfinite(entropy).all(), "a teacher entropy is not finite")
            mass = logp.exp().sum(-1) + tail.exp()
            _refuse(bool(((mass - 1).abs() > _MASS_EPS).any()), "kept and tail mass of a position do not add up to 1")
            return TopkTargets(
                temperature=spec.temperature,
                labels_T=torch.from_numpy(labels),
                ids_TK=torch.from_numpy(ids),
                logp_TK=logp,
                tail_logp_T=tail,
                entropy_T=entropy,
            )


def _payload(column: pa.Array) -> memoryview:
    width = _width(column.type)
    start = column.offset * width
    return memoryview(column.buffers()[1])[start : start + len(column) * width]


def _width(kind: pa.DataType) -> int:
    return kind.byte_width if pa.types.is_fixed_size_binary(kind) else kind.bit_width // 8


def _line(kind: pa.Schema) -> str:
    meta = (kind.metadata or {}).get(b"kdscale", b"").decode(errors="replace")
    return ", ".join(f"{field.name}: {field.type}" for field in kind) + (f" {meta}" if meta else "")


def _refuse(broken: bool | np.bool_, why: str) -> None:
    if broken:
        raise PayloadError(why)
