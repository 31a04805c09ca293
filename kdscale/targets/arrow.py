"""Soft targets as Arrow record batches: checks, checksum, and both ways. The same on the wire and on disk.

T = positions, K = named entries, V = vocabulary, D = hidden size.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import xxhash

from kdscale.batch import DenseTargets, HiddenTargets, SampledTargets, SoftTargets, TopkTargets
from kdscale.errors import PayloadError
from kdscale.spec import TargetSpec
from kdscale.targets.codec import decode_logp, dequantize_rows, encode_logp, pack_ids, quantize_rows, unpack_ids
from kdscale.targets.layout import high_bits, high_bytes, width

# float16 rounds a log-probability by at most 2^-11 of itself; the kept mass may exceed 1 by that much.
_MASS_EPS = 2e-2
_LOWEST = torch.finfo(torch.float16).min


def encode(targets: SoftTargets, spec: TargetSpec, target_schema: pa.Schema, vocab_size: int) -> pa.RecordBatch:
    """The record batch of ``targets`` under ``target_schema``."""
    labels = targets.labels_T.numpy()
    columns: list[Any] = [labels.astype(np.uint16) if vocab_size <= 1 << 16 else labels]
    match targets:
        case TopkTargets():
            columns += [*pack_ids(targets.ids_TK.numpy(), vocab_size), _values(targets.logp_TK, spec)]
            columns.append(_half(targets.tail_logp_T))
            if spec.temperature != 1.0:
                columns.append(targets.shift_T.numpy())
            columns.append(_half(targets.entropy_T))
        case SampledTargets():
            columns += pack_ids(targets.ids_TK.numpy(), vocab_size)
            if spec.sampler == "replacement":
                columns.append((targets.weight_TK * targets.weight_TK.shape[1]).round().numpy().astype(np.uint16))
            else:
                columns += [
                    _values(targets.weight_TK.clamp_max(1.0).log(), spec),
                    targets.kept_T.numpy().astype(np.uint16),
                ]
            columns.append(_half(targets.entropy_T))
        case HiddenTargets() if spec.encoding == "bfloat16":
            columns.append(targets.hidden_TD.contiguous().view(torch.int16).numpy())
        case HiddenTargets():
            values, scale = quantize_rows(targets.hidden_TD)
            columns += [values.numpy(), scale.numpy()]
        case DenseTargets():
            columns.append(targets.logp_TV.numpy())
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
    labels = plane(batch, "label", "<u2" if vocab_size <= 1 << 16 else "<i4").astype(np.int32)
    _refuse(((labels < 0) | (labels >= vocab_size)).any(), f"a label lies outside the vocabulary of {vocab_size}")
    labels_T = torch.from_numpy(labels)
    match spec.payload:
        case "topk":
            return _decode_topk(batch, labels_T, spec, vocab_size)
        case "sampled":
            return _decode_sampled(batch, labels_T, spec, vocab_size)
        case "hidden":
            return HiddenTargets(labels_T, _decode_hidden(batch, spec))
        case "dense":
            logp = torch.from_numpy(plane(batch, "logp", "<f4", vocab_size))
            _refuse(not (logp <= 0).all(), "a log-probability is above 0 or not a number")
            _refuse_mass(logp.exp().sum(-1))
            return DenseTargets(labels_T, logp, spec.temperature)


def _decode_topk(batch: pa.RecordBatch, labels_T: torch.Tensor, spec: TargetSpec, vocab_size: int) -> TopkTargets:
    k = min(spec.k, vocab_size)
    ids = _decode_ids(batch, k, vocab_size)
    logp = _decode_values(batch, k, spec)
    tail = torch.from_numpy(plane(batch, "tail_logp", "<f2")).float()
    _refuse(not (tail <= 0).all(), "a tail log-mass is above 0 or not a number")
    # Below float16's range there is no tail worth the name; exactly -inf stands for none at all.
    kept = logp.exp().sum(-1)
    rest = tail.exp()
    _refuse_mass(kept + rest)
    # Rounding has moved the kept mass a little: what the tail leaves is theirs.
    logp.add_(((1 - rest).clamp_min(torch.finfo(rest.dtype).tiny) / kept).log_()[:, None]).clamp_(max=0.0)
    shift = torch.zeros_like(tail)
    if spec.temperature != 1.0:
        shift = torch.from_numpy(plane(batch, "shift", "<f4"))
        _refuse(not torch.isfinite(shift).all(), "a shift is not finite")
    return TopkTargets(
        labels_T=labels_T,
        ids_TK=ids,
        logp_TK=logp,
        tail_logp_T=tail,
        entropy_T=_decode_entropy(batch),
        shift_T=shift,
        temperature=spec.temperature,
    )


def _decode_sampled(batch: pa.RecordBatch, labels_T: torch.Tensor, spec: TargetSpec, vocab_size: int) -> SampledTargets:
    k = min(spec.k, vocab_size)
    ids, entropy = _decode_ids(batch, k, vocab_size), _decode_entropy(batch)
    if spec.sampler == "replacement":
        weight = torch.from_numpy(plane(batch, "count", "<u2", k).astype(np.float32)) / k
        _refuse_mass(weight.sum(-1))
        return SampledTargets(labels_T, ids, weight, (weight > 0).sum(-1).int(), entropy, spec.temperature)
    kept = torch.from_numpy(plane(batch, "kept", "<u2").astype(np.int32))
    _refuse(bool((kept > k).any()), f"a position keeps more than its {k} entries")
    own = torch.arange(k) < kept[:, None]
    weight = torch.where(own, _decode_values(batch, k, spec).exp(), 0.0)
    mass = weight.sum(-1)
    _refuse(bool((mass > 1 + _MASS_EPS).any()), "the kept mass of a position is above 1")
    # The others share evenly what the kept entries leave; where they leave nothing, rounding is spread over the kept.
    left = torch.where(kept < k, (1 - mass).clamp_min(0.0) / (k - kept).clamp_min(1), 0.0)
    weight = torch.where(own, weight / torch.where((kept == k) | (mass > 1), mass, 1.0)[:, None], left[:, None])
    return SampledTargets(labels_T, ids, weight, kept, entropy, spec.temperature)


def _decode_hidden(batch: pa.RecordBatch, spec: TargetSpec) -> torch.Tensor:
    width = batch.schema.field("hidden").type.byte_width
    if spec.encoding == "bfloat16":
        hidden = torch.from_numpy(plane(batch, "hidden", "<i2", width // 2)).view(torch.bfloat16)
    else:
        scale = torch.from_numpy(plane(batch, "scale", "<f4"))
        hidden = dequantize_rows(torch.from_numpy(plane(batch, "hidden", "i1", width)), scale)
    _refuse(not torch.isfinite(hidden).all(), "a hidden state is not finite")
    return hidden


def _decode_ids(batch: pa.RecordBatch, k: int, vocab_size: int) -> torch.Tensor:
    planes = [plane(batch, "ids_low", "<u2", k)]
    if high_bytes(k, vocab_size):
        wide = high_bits(vocab_size) == 16
        planes.append(plane(batch, "ids_high", "<u2" if wide else "u1", k if wide else high_bytes(k, vocab_size)))
    ids = unpack_ids(planes, vocab_size)
    _refuse((ids >= vocab_size).any(), f"an id lies outside the vocabulary of {vocab_size}")
    return torch.from_numpy(ids)


def _decode_values(batch: pa.RecordBatch, k: int, spec: TargetSpec) -> torch.Tensor:
    """Log-probabilities, finite and at most 0."""
    if spec.encoding == "uint8":
        return decode_logp(torch.from_numpy(plane(batch, "value", "u1", k)))
    logp = torch.from_numpy(plane(batch, "value", "<f2", k)).float()
    _refuse(not (torch.isfinite(logp) & (logp <= 0)).all(), "a log-probability is not finite or above 0")
    return logp


def _decode_entropy(batch: pa.RecordBatch) -> torch.Tensor:
    entropy = torch.from_numpy(plane(batch, "entropy", "<f2")).float()
    _refuse(not torch.isfinite(entropy).all(), "a teacher entropy is not finite")
    return entropy


def _values(logp: torch.Tensor, spec: TargetSpec) -> np.ndarray:
    if spec.encoding == "uint8":
        return encode_logp(logp).numpy()
    # A log-probability below float16's range stands for none at all: keep it finite.
    values: np.ndarray = logp.clamp_min(_LOWEST).half().numpy()
    return values


def _half(values: torch.Tensor) -> np.ndarray:
    halves: np.ndarray = values.half().numpy()
    return halves


def _refuse_mass(mass_T: torch.Tensor) -> None:
    _refuse(bool(((mass_T - 1).abs() > _MASS_EPS).any()), "the mass of a position does not add up to 1")


def _payload(column: pa.Array) -> memoryview:
    size = width(column.type)
    start = column.offset * size
    return memoryview(column.buffers()[1])[start : start + len(column) * size]


def _line(kind: pa.Schema) -> str:
    meta = (kind.metadata or {}).get(b"kdscale", b"").decode(errors="replace")
    return ", ".join(f"{field.name}: {field.type}" for field in kind) + (f" {meta}" if meta else "")


def _refuse(broken: bool | np.bool_, why: str) -> None:
    if broken:
        raise PayloadError(why)
