"""Record batches to soft targets; every value is checked before it is used.

T = positions, K = named entries, V = vocabulary, D = hidden size.
"""

import numpy as np
import pyarrow as pa
import torch

from kdscale.batch import DenseTargets, HiddenTargets, SampledTargets, SoftTargets, TopkTargets
from kdscale.errors import PayloadError
from kdscale.spec import TargetSpec
from kdscale.targets.arrow import plane, rows_of_bytes
from kdscale.targets.codec import (
    decode_between,
    decode_logp,
    dequantize_rows,
    unpack_ids,
    unpack_nibbles,
    unpack_ragged,
    unpack_sorted,
)
from kdscale.targets.layout import count_dtype, high_bits, high_bytes, id_bytes, value_bytes

# float16 rounds a log-probability by at most 2^-11 of itself; the kept mass may exceed 1 by that much.
_MASS_EPS = 2e-2
# In four bits an entry may be off by a third; only a row of nonsense is further off as a whole.
_COARSE_MASS_EPS = 0.5
# Exponent bits of the 16-bit floats, all set where a number is infinite or NaN.
_HALF_EXPONENT, _BFLOAT_EXPONENT = 0x7C00, 0x7F80
_ID_TYPES = {2: "<u2", 3: "<i4", 4: "<i4"}


def decode(batch: pa.RecordBatch, spec: TargetSpec, vocab_size: int) -> SoftTargets:
    """The soft targets in a batch that passed ``arrow.check`` and whose checksum agreed.

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
            logp = torch.from_numpy(plane(batch, "logp", "<f4", vocab_size).copy())
            _refuse(not (logp <= 0).all(), "a log-probability is above 0 or not a number")
            _refuse_mass(logp.exp().sum(-1))
            return DenseTargets(labels_T, logp, spec.temperature)


def _decode_topk(batch: pa.RecordBatch, labels_T: torch.Tensor, spec: TargetSpec, vocab_size: int) -> TopkTargets:
    k = min(spec.k, vocab_size)
    ids, logp, tail = (_sorted if spec.encoding == "uint4" else _ordered)(batch, k, spec, vocab_size)
    # Below float16's range there is no tail worth the name; exactly -inf stands for none at all.
    kept = logp.exp().sum(-1)
    rest = tail.exp()
    if spec.encoding == "uint4":
        # Both are rounded alike: neither can be had from the other.
        _refuse_mass(kept + rest, _COARSE_MASS_EPS)
        excess = (kept + rest).log_()
        tail, logp = (tail - excess).clamp_(max=0.0), logp.sub_(excess[:, None])
    else:
        _refuse_mass(kept + rest)
        # Rounding has moved the kept mass a little: what the tail leaves is theirs.
        logp.add_(((1 - rest).clamp_min(torch.finfo(rest.dtype).tiny) / kept).log_()[:, None])
    shift = torch.zeros_like(tail)
    if spec.temperature != 1.0:
        shift = torch.from_numpy(plane(batch, "shift", "<f4").copy())
        _refuse(not torch.isfinite(shift).all(), "a shift is not finite")
    return TopkTargets(
        labels_T=labels_T,
        ids_TK=ids,
        logp_TK=logp.clamp_(max=0.0),
        tail_logp_T=tail,
        entropy_T=_entropy(batch),
        shift_T=shift,
        temperature=spec.temperature,
    )


def _ordered(
    batch: pa.RecordBatch, k: int, spec: TargetSpec, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, log-probabilities, log tail mass), likeliest first."""
    planes = [plane(batch, "ids_low", "<u2", k)]
    if high_bytes(k, vocab_size):
        wide = high_bits(vocab_size) == 16
        planes.append(plane(batch, "ids_high", "<u2" if wide else "u1", k if wide else high_bytes(k, vocab_size)))
    ids = unpack_ids(planes, vocab_size)
    _refuse_ids(ids, vocab_size)
    tail = torch.from_numpy(plane(batch, "tail_logp", "<f2").astype(np.float32))
    _refuse(not (tail <= 0).all(), "a tail log-mass is above 0 or not a number")
    return torch.from_numpy(ids), _values(plane(batch, "value", *_value_type(spec), k), spec), tail


def _sorted(
    batch: pa.RecordBatch, k: int, spec: TargetSpec, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, log-probabilities, log tail mass) of ``uint4``, the likeliest entry brought to the front."""
    widths = {name: batch.schema.field(name).type.byte_width for name in ("ids_low", "ids_bitmap", "value")}
    low, bitmap, value = (plane(batch, name, "u1", width) for name, width in widths.items())
    ids = unpack_sorted([low, bitmap], k, vocab_size)
    _refuse_ids(ids, vocab_size)
    first = plane(batch, "first", count_dtype(k)).astype(np.int64)
    _refuse(bool((first >= k).any()), f"the likeliest of {k} entries is none of them")
    codes = unpack_nibbles(value, k)
    rows = np.arange(len(first))
    for entries in (ids, codes):
        front = entries[rows, first]
        entries[rows, first] = entries[:, 0]
        entries[:, 0] = front
    ends, tail = (torch.from_numpy(plane(batch, *one).copy()) for one in (("ends", "u1", 2), ("tail", "u1")))
    tail_logp = decode_logp(tail) if k < vocab_size else torch.full(tail.shape, -torch.inf)
    return torch.from_numpy(ids), decode_between(torch.from_numpy(codes), ends), tail_logp


def _decode_sampled(batch: pa.RecordBatch, labels_T: torch.Tensor, spec: TargetSpec, vocab_size: int) -> SampledTargets:
    k = min(spec.k, vocab_size)
    count, ids = unpack_ragged(rows_of_bytes(batch, "ids"), id_bytes(vocab_size), _ID_TYPES[id_bytes(vocab_size)], k)
    _refuse_ids(ids, vocab_size)
    width = value_bytes(spec)
    kept, raw = unpack_ragged(rows_of_bytes(batch, "weights"), width, f"<u{width}", k)
    _refuse(bool((kept > count).any()), "a position has more weights than entries")
    raw = np.pad(raw, ((0, 0), (0, ids.shape[1] - raw.shape[1])))
    count_T, kept_T, index_K = torch.from_numpy(count), torch.from_numpy(kept), torch.arange(ids.shape[1])
    own = index_K < kept_T[:, None]
    if spec.sampler == "replacement":
        weight = torch.from_numpy(raw.astype(np.float32)) / k
        _refuse_mass(weight.sum(-1))
    else:
        weight = torch.where(own, _values(raw, spec).exp_(), 0.0)
        mass = weight.sum(-1)
        _refuse(bool((mass > 1 + _MASS_EPS).any()), "the kept mass of a position is above 1")
        # The others share evenly what the kept entries leave; where they leave nothing, rounding is spread over the kept.
        drawn = count_T - kept_T
        left = torch.where(drawn > 0, (1 - mass).clamp_min(0.0) / drawn.clamp_min(1), 0.0)
        weight = weight / torch.where((drawn == 0) | (mass > 1), mass, 1.0)[:, None]
        weight = torch.where(own, weight, torch.where(index_K < count_T[:, None], left[:, None], 0.0))
    counts = (count_T.int(), kept_T.int())
    ids_TK = torch.from_numpy(ids.astype(np.int32))
    return SampledTargets(labels_T, ids_TK, weight, *counts, _entropy(batch), spec.temperature)


def _decode_hidden(batch: pa.RecordBatch, spec: TargetSpec) -> torch.Tensor:
    width = batch.schema.field("hidden").type.byte_width
    if spec.encoding == "bfloat16":
        bits = plane(batch, "hidden", "<u2", width // 2)
        _refuse(_any_special(bits, _BFLOAT_EXPONENT), "a hidden state is not finite")
        return torch.from_numpy(bits.copy().view(np.int16)).view(torch.bfloat16)
    scale = torch.from_numpy(plane(batch, "scale", "<f4").copy())
    hidden = dequantize_rows(torch.from_numpy(plane(batch, "hidden", "i1", width).copy()), scale)
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
    _refuse(bool(ids.size) and int(ids.max()) >= vocab_size, f"an id lies outside the vocabulary of {vocab_size}")


def _refuse_mass(mass_T: torch.Tensor, eps: float = _MASS_EPS) -> None:
    _refuse(bool(((mass_T - 1).abs() > eps).any()), "the mass of a position does not add up to 1")


def _refuse(broken: bool | np.bool_, why: str) -> None:
    if broken:
        raise PayloadError(why)
