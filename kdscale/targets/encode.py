"""Soft targets to record batches.

T = positions, K = named entries.
"""

import numpy as np
import pyarrow as pa
import torch

from kdscale.batch import DenseTargets, HiddenTargets, SampledTargets, SoftTargets, TopkTargets
from kdscale.spec import Encoding, TargetSpec
from kdscale.targets.arrow import Column, record_batch
from kdscale.targets.codec import (
    encode_between,
    encode_logp,
    narrow_logp,
    pack_entries,
    pack_ids,
    pack_nibbles,
    pack_sorted,
    quantize_rows,
)
from kdscale.targets.layout import count_dtype, id_bytes, value_bytes


def encode(targets: SoftTargets, spec: TargetSpec, target_schema: pa.Schema, vocab_size: int) -> pa.RecordBatch:
    """The record batch of ``targets`` under ``target_schema``, which is ``layout.schema``'s of ``spec``."""
    labels = targets.labels_T.numpy()
    columns: list[Column] = [labels.astype(np.uint16) if vocab_size <= 1 << 16 else labels]
    match targets:
        case TopkTargets():
            columns += _sorted(targets, vocab_size) if spec.encoding == "uint4" else _ordered(targets, spec, vocab_size)
            if spec.temperature != 1.0:
                columns.append(targets.shift_T.numpy())
            columns.append(_half(targets.entropy_T))
        case SampledTargets():
            columns += _samples(targets, spec, vocab_size)
            columns.append(_half(targets.entropy_T))
        case HiddenTargets():
            columns += _hidden(targets.hidden_TD, spec.encoding)
        case DenseTargets():
            columns.append(targets.logp_TV.numpy())
    if targets.layers_TND is not None:
        for states_TD in targets.layers_TND.unbind(1):
            columns += _hidden(states_TD, spec.layers_encoding)
    return record_batch(columns, target_schema)


def _hidden(hidden_TD: torch.Tensor, encoding: Encoding) -> list[Column]:
    """bfloat16's bits; or integers, and the scale of each row."""
    if encoding == "bfloat16":
        return [hidden_TD.contiguous().view(torch.int16).numpy()]
    values, scale = quantize_rows(hidden_TD)
    return [values.numpy(), scale.numpy()]


def _ordered(targets: TopkTargets, spec: TargetSpec, vocab_size: int) -> list[np.ndarray]:
    planes = pack_ids(targets.ids_TK.numpy(), vocab_size)
    return [*planes, _values(targets.logp_TK, spec), _half(targets.tail_logp_T)]


def _sorted(targets: TopkTargets, vocab_size: int) -> list[np.ndarray]:
    """Ids ascending, and where the likeliest stands among them."""
    ids = targets.ids_TK.numpy()
    codes, ends = encode_between(targets.logp_TK)
    # An id and its code as one number: numbers are sorted several times faster than places, and nothing is gathered.
    both = ids.astype(np.int64)
    both <<= 4
    both |= codes.numpy()
    both.sort(axis=1)
    ascending = (both >> 4).astype(np.int32)
    planes = [*pack_sorted(ascending, vocab_size), pack_nibbles((both & 0xF).astype(np.uint8)), ends.numpy()]
    planes.append((ascending == ids[:, :1]).argmax(axis=1).astype(count_dtype(ids.shape[1])))
    return [*planes, encode_logp(targets.tail_logp_T.clone()).numpy()]


def _samples(targets: SampledTargets, spec: TargetSpec, vocab_size: int) -> list[Column]:
    """Rows of the ids used, each behind it with the weight that is its own; how many have one, where that is not all."""
    if spec.sampler == "replacement":
        values = (targets.weight_TK * min(spec.k, vocab_size)).round().numpy().astype(f"u{value_bytes(spec)}")
    else:
        values = _values(targets.weight_TK.clamp(torch.finfo(torch.float32).tiny, 1.0).log(), spec)
    count, kept = targets.count_T.numpy(), targets.kept_T.numpy()
    widths = (id_bytes(vocab_size), value_bytes(spec))
    entries = pack_entries(targets.ids_TK.numpy(), values.view(f"u{widths[1]}"), count, kept, widths)
    if spec.sampler == "replacement":
        return [entries]
    return [entries, kept.astype(count_dtype(min(spec.k, vocab_size)))]


def _values(logp: torch.Tensor, spec: TargetSpec) -> np.ndarray:
    if spec.encoding == "uint8":
        return encode_logp(logp).numpy()
    values: np.ndarray = (logp if logp.dtype == torch.float16 else narrow_logp(logp, spec)).numpy()
    return values


def _half(values: torch.Tensor) -> np.ndarray:
    halves: np.ndarray = values.half().numpy()
    return halves
