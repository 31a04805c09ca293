"""Record batches over plain arrays: made, checked, checksummed, read. The same on the wire and on disk."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from kdscale.errors import PayloadError
from kdscale.targets.layout import width

Column = np.ndarray | tuple[np.ndarray, np.ndarray]
"""Fixed-width values, rows first; or (int32 offsets [rows + 1], bytes) of rows of unequal length."""
CHECKSUM_DIGITS = 32
_CANONICAL = json.JSONEncoder(sort_keys=True)


def record_batch(columns: Sequence[Column], batch_schema: pa.Schema) -> pa.RecordBatch:
    """A record batch over the bytes of ``columns``, one per field."""
    arrays = []
    for field, column in zip(batch_schema, columns, strict=True):
        buffers = column if isinstance(column, tuple) else (column,)
        rows = len(buffers[0]) - (len(buffers) - 1)
        raw = [pa.py_buffer(np.ascontiguousarray(one)) for one in buffers]
        arrays.append(pa.Array.from_buffers(field.type, rows, [None, *raw]))
    return pa.RecordBatch.from_arrays(arrays, schema=batch_schema)


def plane(batch: pa.RecordBatch, name: str, dtype: str, width: int | None = None) -> np.ndarray:
    """Fixed-width column ``name`` as an array [rows] or [rows, width] over the batch's own memory: read-only."""
    column = batch.column(name)
    (raw,) = _regions(column)
    flat = _numbers(raw, dtype)
    return flat if width is None else flat.reshape(len(column), width)


def rows_of_bytes(batch: pa.RecordBatch, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Column ``name`` of unequal rows: (offsets int32 [rows + 1] from 0, bytes uint8), read-only."""
    offsets, raw = _regions(batch.column(name))
    starts = _numbers(offsets, "<i4")
    if len(starts) and starts[0]:
        starts = starts - starts[0]
    return starts, np.frombuffer(raw, np.uint8)


def _numbers(raw: pa.Buffer | memoryview, dtype: str) -> np.ndarray:
    flat = np.frombuffer(raw, dtype=dtype)
    # Buffers may arrive unaligned.
    return flat if flat.flags.aligned else np.frombuffer(bytes(raw), dtype=dtype)


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


def stated(metadata: dict[str, Any]) -> bytes:
    """``metadata`` as the bytes that a checksum is of."""
    return _CANONICAL.encode(metadata).encode()


def checksum(batch: pa.RecordBatch, schema_bytes: bytes, statement: bytes) -> str:
    """xxh3 of all values, the schema and what is ``stated`` of them, as ``CHECKSUM_DIGITS`` hex digits.

    ``schema_bytes``: the serialized schema, which is the batch's own or one that ``check`` has found equal to it. Made once for
    many batches.
    """
    digest = xxhash.xxh3_128(schema_bytes)
    digest.update(statement)
    for column in batch.columns:
        for region in _regions(column):
            digest.update(region)
    return digest.hexdigest()


def _regions(column: pa.Array) -> list[pa.Buffer | memoryview]:
    """The bytes that hold the column's values: of each buffer just the part that is the column's."""
    _, first, *data = column.buffers()
    if not data:
        if first is not None and first.size == column.nbytes:
            return [first]
        size = width(column.type)
        return [_bytes(first)[column.offset * size : (column.offset + len(column)) * size]]
    offsets = _bytes(first)[4 * column.offset : 4 * (column.offset + len(column) + 1)]
    if not len(column):
        return [offsets[:0], _bytes(data[0])[:0]]
    return [offsets, _bytes(data[0])[int.from_bytes(offsets[:4], "little") : int.from_bytes(offsets[-4:], "little")]]


def _bytes(buffer: pa.Buffer | None) -> memoryview:
    return memoryview(buffer).cast("B") if buffer is not None else memoryview(b"")


def _line(kind: pa.Schema) -> str:
    meta = (kind.metadata or {}).get(b"kdscale", b"").decode(errors="replace")
    return ", ".join(f"{field.name}: {field.type}" for field in kind) + (f" {meta}" if meta else "")
