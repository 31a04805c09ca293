"""Record batches to soft targets; every value is checked before it is used.

T = positions, K = named entries, V = vocabulary, D = hidden size.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from kdscale.batch import DenseTargets, HiddenTargets, SampledTargets, SoftTargets, TopkTargets
from kdscale.errors import PayloadError
from kdscale.spec import Encoding, TargetSpec
from kdscale.targets.arrow import plane, rows_of_bytes
from kdscale.targets.codec import (
    decode_between,
    decode_logp,
    dequantize_rows,
    sum_between,
    unpack_entries,
    unpack_ids,
    unpack_sorted,
    weights_of_codes,
    weights_of_halves,
)
from kdscale.targets.layout import count_dtype, high_bits, high_bytes, id_bytes, layer_column, scale_column, value_bytes

# float16 rounds a log-probability by at most 2^-11 of itself; the kept mass may exceed 1 by that much.
_MASS_EPS = 2e-2
# Steps of uint8 are even on the fourth root: K codes, each off by half a step, are off by 2/255 K^(1/4) together at most.
_STEP = 2 / 255
# In four bits an entry may be off by a third; only a row of nonsense is further off as a whole.
_COARSE_MASS_EPS = 0.5
# Exponent bits of the 16-bit floats, all set where a number is infinite or NaN.
_HALF_EXPONENT, _BFLOAT_EXPONENT = 0x7C00, 0x7F80


def decode(batch: pa.RecordBatch, spec: TargetSpec, vocab_size: int) -> SoftTargets:
    """The soft targets in a batch that passed ``arrow.check`` and whose checksum agreed.

    Raises:
        PayloadError: ids outside the vocabulary, log-probabilities that are not finite or above 0, mass above 1.
    """
    labels = plane(batch, "label", "<u2" if vocab_size <= 1 << 16 else "<i4").astype(np.int32)
    # As unsigned numbers those below 0 are the largest.
    _refuse(labels.view(np.uint32).max(initial=0) >= vocab_size, f"a label lies outside the vocabulary of {vocab_size}")
    labels_T = torch.from_numpy(labels)
    targets = _decode_payload(batch, labels_T, spec, vocab_size)
    if not spec.layers:
        return targets
    states = [_decode_hidden(batch, layer_column(layer), spec.layers_encoding) for layer in spec.layers]
    return replace(targets, layers_TND=torch.stack(states, dim=1))


def _decode_payload(batch: pa.RecordBatch, labels_T: torch.Tensor, spec: TargetSpec, vocab_size: int) -> SoftTargets:
    match spec.payload:
        case "topk":
            return _decode_topk(batch, labels_T, spec, vocab_size)
        case "sampled":
            return _decode_sampled(batch, labels_T, spec, vocab_size)
        case "hidden":
            return HiddenTargets(labels_T, _decode_hidden(batch, "hidden", spec.encoding))
        case "dense":
            logp = torch.from_numpy(plane(batch, "logp", "<f4", vocab_size).copy())
            _refuse(not (logp <= 0).all(), "a log-probability is above 0 or not a number")
            _refuse_mass(logp.exp().sum(-1))
            return DenseTargets(labels_T, logp, spec.temperature)


def _decode_topk(batch: pa.RecordBatch, labels_T: torch.Tensor, spec: TargetSpec, vocab_size: int) -> TopkTargets:
    k = min(spec.k, vocab_size)
    ids, logp, tail = (_sorted if spec.encoding == "uint4" else _ordered)(batch, k, spec, vocab_size)
    shift = torch.zeros_like(tail)
    if spec.temperature != 1.0:
        shift = torch.from_numpy(plane(batch, "shift", "<f4").copy())
        _refuse(not torch.isfinite(shift).all(), "a shift is not finite")
    return TopkTargets(
        labels_T=labels_T,
        ids_TK=ids,
        logp_TK=logp,
        tail_logp_T=tail,
        entropy_T=_entropy(batch),
        shift_T=shift,
        temperature=spec.temperature,
    )


def _ordered(
    batch: pa.RecordBatch, k: int, spec: TargetSpec, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, log-probabilities, log tail mass), likeliest first; together of mass 1."""
    planes = [plane(batch, "ids_low", "<u2", k)]
    if high_bytes(k, vocab_size):
        wide = high_bits(vocab_size) == 16
        planes.append(plane(batch, "ids_high", "<u2" if wide else "u1", k if wide else high_bytes(k, vocab_size)))
    ids = unpack_ids(planes, vocab_size)
    _refuse_ids(ids, vocab_size)
    tail = torch.from_numpy(plane(batch, "tail_logp", "<f2").astype(np.float32))
    _refuse(not (tail <= 0).all(), "a tail log-mass is above 0 or not a number")
    logp = _values(plane(batch, "value", *_value_type(spec), k), spec)
    # Below float16's range there is no tail worth the name; exactly -inf stands for none at all.
    kept, rest = logp.exp().sum(-1), tail.exp()
    _refuse(not (kept > 0).all(), "no entry of a position has any mass")
    _refuse_mass(kept + rest, _mass_eps(spec, k))
    # Rounding has moved the kept mass a little: what the tail leaves is theirs.
    logp.add_(((1 - rest).clamp_min(torch.finfo(rest.dtype).tiny) / kept).log_()[:, None])
    return torch.from_numpy(ids), logp.clamp_(max=0.0), tail


def _sorted(
    batch: pa.RecordBatch, k: int, spec: TargetSpec, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, log-probabilities, log tail mass) of ``uint4``, the likeliest entry brought to the front; together of mass 1."""
    widths = {name: batch.schema.field(name).type.byte_width for name in ("ids_low", "ids_bitmap", "value")}
    low, bitmap, value = (plane(batch, name, "u1", width) for name, width in widths.items())
    first = plane(batch, "first", count_dtype(k)).astype(np.int64)
    ids = unpack_sorted([low, bitmap], k, vocab_size, first)
    _refuse_ids(ids, vocab_size)
    ends, tail_code = plane(batch, "ends", "u1", 2), torch.from_numpy(plane(batch, "tail", "u1").copy())
    tail = decode_logp(tail_code) if k < vocab_size else torch.full(tail_code.shape, -torch.inf)
    # Kept entries and tail are rounded alike: neither can be had from the other.
    mass = sum_between(value, ends, k) + tail.exp()
    _refuse_mass(mass, _COARSE_MASS_EPS)
    excess = mass.log_()
    logp = decode_between(value, ends, excess, k, first)
    return torch.from_numpy(ids), logp, (tail - excess).clamp_(max=0.0)


def _decode_sampled(batch: pa.RecordBatch, labels_T: torch.Tensor, spec: TargetSpec, vocab_size: int) -> SampledTargets:
    k, widths = min(spec.k, vocab_size), (id_bytes(vocab_size), value_bytes(spec))
    # Counts of draws, or probabilities.
    drawn = spec.sampler == "replacement"
    if drawn:
        table = np.arange(1 << 8 * widths[1], dtype=np.float32) / np.float32(k)
    else:
        table = weights_of_codes() if spec.encoding == "uint8" else weights_of_halves()
    kept = None if drawn else plane(batch, "kept", count_dtype(k)).astype(np.int32)
    found = unpack_entries(rows_of_bytes(batch, "entries"), kept, widths, k, table, shared=not drawn)
    _refuse(found.largest >= vocab_size, f"an id lies outside the vocabulary of {vocab_size}")
    if drawn:
        _refuse_mass(torch.from_numpy(found.mass_T))
    else:
        eps = _mass_eps(spec, k)
        _refuse(not (found.mass_T <= 1 + eps).all(), "the kept mass of a position is above 1 or not a number")
        short = (found.mass_T < 1 - eps) & (found.kept_T == found.count_T)
        _refuse(short.any(), "the mass of a position does not add up to 1")
    ids_TK, weights_TK = torch.from_numpy(found.ids_TK), torch.from_numpy(found.weights_TK)
    counts = torch.from_numpy(found.count_T), torch.from_numpy(found.kept_T)
    return SampledTargets(labels_T, ids_TK, weights_TK, *counts, _entropy(batch), spec.temperature)


def _decode_hidden(batch: pa.RecordBatch, name: str, encoding: Encoding) -> torch.Tensor:
    """bfloat16 [T, D] of the column ``name``."""
    width = batch.schema.field(name).type.byte_width
    if encoding == "bfloat16":
        bits = plane(batch, name, "<u2", width // 2)
        _refuse(_any_special(bits, _BFLOAT_EXPONENT), "a hidden state is not finite")
        return torch.from_numpy(bits.copy().view(np.int16)).view(torch.bfloat16)
    scale = torch.from_numpy(plane(batch, scale_column(name), "<f4").copy())
    hidden = dequantize_rows(torch.from_numpy(plane(batch, name, "i1", width).copy()), scale)
    # 127 scales at most: a row is finite where its largest possible value is.
    _refuse(not torch.isfinite((127 * scale).bfloat16()).all(), "a hidden state is not finite")
    return hidden


def _value_type(spec: TargetSpec) -> tuple[str]:
    return ("u1" if spec.encoding == "uint8" else "<u2",)


def _values(raw: np.ndarray, spec: TargetSpec) -> torch.Tensor:
    """Log-probabilities, finite and at most 0, from the codes or the bits of float16 numbers."""
    if spec.encoding == "uint8":
        return decode_logp(torch.from_numpy(raw.copy()))
    # As integers: the sign bit alone or together with a finite number, or plain 0.
    wrong = ((raw ^ 0x8000) >= _HALF_EXPONENT) & (raw != 0)
    _refuse(bool(wrong.any()), "a log-probability is not finite or above 0")
    return torch.from_numpy(raw.copy().view(np.float16)).float()


def _entropy(batch: pa.RecordBatch) -> torch.Tensor:
    bits = plane(batch, "entropy", "<u2")
    _refuse(_any_special(bits, _HALF_EXPONENT), "a teacher entropy is not finite")
    return torch.from_numpy(bits.copy().view(np.float16)).float()


def _any_special(bits: np.ndarray, exponent: int) -> bool:
    """Whether any 16-bit float, given as uint16, is infinite or NaN. Integers compare several times faster."""
    return bool(bits.size) and int((bits & 0x7FFF).max()) >= exponent


def _refuse_ids(ids: np.ndarray, vocab_size: int) -> None:
    # As unsigned numbers those below 0 are the largest.
    _refuse(ids.view(np.uint32).max(initial=0) >= vocab_size, f"an id lies outside the vocabulary of {vocab_size}")


def _mass_eps(spec: TargetSpec, k: int) -> float:
    """How far rounding may carry the mass of K entries from 1."""
    return _MASS_EPS + (_STEP * k**0.25 if spec.encoding == "uint8" else 0)


def _refuse_mass(mass_T: torch.Tensor, eps: float = _MASS_EPS) -> None:
    _refuse(bool(((mass_T - 1).abs() > eps).any()), "the mass of a position does not add up to 1")


def _refuse(broken: bool | np.bool_, why: str) -> None:
    if broken:
        raise PayloadError(why)
