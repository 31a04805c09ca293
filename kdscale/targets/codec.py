"""Byte-aligned planes for token ids and probabilities: decoding is a few vector operations, in NumPy or torch.

Ids: 16 low bits, and a plane of 1, 2, 4, 8 or 16 high bits where the vocabulary needs them; or, where their order does not
matter, sorted and split into low bits and a unary bitmap of the rest (Elias 1974; Fano 1971), about 2 bits an id above what
a set of ids holds. Probabilities: float16 log-probabilities, one byte for the fourth root of the probability, or four bits
between the row's two ends.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from kdscale.errors import PayloadError
from kdscale.spec import TargetSpec
from kdscale.targets.layout import bitmap_bytes, high_bits, high_bytes, low_bits, low_bytes

_LEVELS = 255
_BLOCK_ROWS = 256  # their float32 copies stay in the cache
# KL error of rounding a probability p by its logarithm's error d is p d^2 / 2 in sum. A uniform grid on p^a makes it
# p^(1-2a) / a^2 an entry: a = 1/4 weighs the few likely and the many unlikely entries of real distributions about evenly,
# and needs no parameters in the row.
_ROOT = 0.25
# With few levels, steps of even size between the row's own ends lose least; a root flatter than the fourth then weighs the
# entries best (1,024 positions of SmolLM2-135M: KL 4e-3 at K = 128 in 4 bits, where fourth roots of the whole range lose 1e-2).
_FLAT_ROOT = 0.1
_FEW_LEVELS = 15
_LOWEST = torch.finfo(torch.float16).min
_CODES = torch.arange(_FEW_LEVELS + 1, dtype=torch.float32)
_LOG_OF_CODE = torch.from_numpy(
    np.log(np.maximum(np.arange(_LEVELS + 1), 0.5, dtype=np.float64) / _LEVELS).astype(np.float32) / np.float32(_ROOT)
)


class Entries(NamedTuple):
    """Rows of entries laid out; K is the largest count, zeros stand behind a row's last."""

    ids_TK: np.ndarray
    """int32."""
    weights_TK: np.ndarray
    """float32."""
    count_T: np.ndarray
    """int32: entries used."""
    kept_T: np.ndarray
    """int32: those with a weight of their own, in front."""
    mass_T: np.ndarray
    """float64: the sum of the weights given; NaN where one of them is."""
    largest: int
    """Of all ids, taken as numbers without a sign; 0 where there is none."""


def narrow_ids(ids: torch.Tensor, spec: TargetSpec, vocab_size: int) -> torch.Tensor:
    """Ids (int64 or int32, any shape) as int16 where their 16 bits are what travels of them, else int32."""
    return ids.short() if spec.encoding != "uint4" and not high_bits(vocab_size) else ids.int()


def narrow_logp(logp: torch.Tensor, spec: TargetSpec) -> torch.Tensor:
    """Log-probabilities as float16 where that is what travels, else as they are."""
    # One below float16's range stands for none at all: keep it finite.
    return logp.half().clamp_min_(_LOWEST) if spec.encoding == "float16" else logp


def pack_ids(ids: np.ndarray, vocab_size: int) -> list[np.ndarray]:
    """Split int32 ids [rows, count] into their planes, low first; int16 of ``narrow_ids`` are their only one."""
    if ids.dtype == np.int16:
        return [ids.view(np.uint16)]
    planes: list[np.ndarray] = [ids.astype(np.uint16)]  # wraps: the low bits
    bits = high_bits(vocab_size)
    if not bits:
        return planes
    high = ids >> 16
    if bits == 16:
        planes.append(high.astype(np.uint16))
    else:
        each = 8 // bits
        padded = np.zeros((ids.shape[0], high_bytes(ids.shape[1], vocab_size) * each), np.uint8)
        padded[:, : ids.shape[1]] = high
        packed = np.zeros((ids.shape[0], padded.shape[1] // each), np.uint8)
        for index in range(each):
            packed |= padded[:, index::each] << (bits * index)
        planes.append(packed)
    return planes


def unpack_ids(planes: list[np.ndarray], vocab_size: int) -> np.ndarray:
    """The int32 ids [rows, count] whose planes these are."""
    ids = planes[0].astype(np.int32)
    bits = high_bits(vocab_size)
    if bits == 16:
        ids |= planes[1].astype(np.int32) << 16
    elif bits:
        each = 8 // bits
        for index in range(each):
            part = ids[:, index::each]
            part |= ((planes[1][:, : part.shape[1]] >> (bits * index)) & ((1 << bits) - 1)).astype(np.int32) << 16
    return ids


def encode_logp(logp: torch.Tensor) -> torch.Tensor:
    """uint8 codes of log-probabilities: round(255 p^(1/4))."""
    return (logp.mul(_ROOT).exp_().mul_(_LEVELS)).round_().to(torch.uint8)


def decode_logp(codes: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, float32, of ``encode_logp``'s codes: within 2 / code of the original for codes above 1."""
    return _LOG_OF_CODE.index_select(0, codes.reshape(-1).int()).view(codes.shape)


@cache
def weights_of_codes() -> np.ndarray:
    """Probabilities, float32 [256], that ``encode_logp``'s codes stand for."""
    return _LOG_OF_CODE.exp().numpy()


@cache
def weights_of_halves() -> np.ndarray:
    """Probabilities, float32 [65536], whose logarithm a float16 of these bits is; NaN where that is above 0 or not finite."""
    logp = torch.arange(-(1 << 15), 1 << 15).short().view(torch.float16).float().roll(1 << 15)
    return torch.where(torch.isfinite(logp) & (logp <= 0), logp.exp(), torch.nan).numpy()


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """Four-bit values, uint8 [rows, count], as [rows, ceil(count / 2)]: the second half above the first."""
    half = -(-values.shape[1] // 2)
    packed = values[:, :half].copy()
    packed[:, : values.shape[1] - half] |= values[:, half:] << 4
    return packed


def pack_sorted(ids: np.ndarray, vocab_size: int) -> list[np.ndarray]:
    """Ascending int32 ids [rows, count] as their low bits and a bitmap: bit ``(id >> low bits) + n`` stands for entry n."""
    from kdscale.targets import kernels  # only the compact forms pay for its import

    rows, count = ids.shape
    bits = low_bits(count, vocab_size)
    low = (ids & 0xFF).astype(np.uint8)
    if bits == 12:
        low = np.concatenate([low, pack_nibbles(((ids >> 8) & 0xF).astype(np.uint8))], axis=1)
    bitmap = np.zeros((rows, bitmap_bytes(count, vocab_size)), np.uint8)
    kernels.set_places(ids, bits, bitmap)
    return [low, bitmap]


def unpack_sorted(planes: list[np.ndarray], count: int, vocab_size: int, first: np.ndarray) -> np.ndarray:
    """The int32 ids [rows, count] of ``pack_sorted``, but entry ``first[r]`` (int64 [rows]) of row r and the one in front have
    changed places.

    Raises:
        PayloadError: a row's bitmap does not name ``count`` ids; ``first`` is none of them.
    """
    from kdscale.targets import kernels

    low, packed = planes
    bits = low_bits(count, vocab_size)
    _require(
        len(low) == len(packed) == len(first) and low.shape[1] == low_bytes(count, vocab_size), "rows of ids are cut"
    )
    _require_first(first, count)
    ids = np.empty((len(packed), count), np.int32)
    _require(kernels.sorted_ids(low, packed, bits, count, first, ids), f"a bitmap of ids does not name {count} of them")
    return ids


def pack_entries(
    ids: np.ndarray, values: np.ndarray, count: np.ndarray, kept: np.ndarray, widths: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The first ``count[r]`` ids (int32 [rows, K]) of each row, each of the first ``kept[r]`` with its value (uint8 or uint16)
    behind it: (int32 offsets [rows + 1], bytes), little-endian; ``widths`` of an id and of a value, in bytes."""
    from kdscale.targets import kernels

    offsets = np.zeros(len(count) + 1, np.int32)
    np.cumsum(count * widths[0] + kept * widths[1], out=offsets[1:])
    packed = np.empty(int(offsets[-1]), np.uint8)
    kernels.pack(np.ascontiguousarray(ids), np.ascontiguousarray(values), count, kept, *widths, packed)
    return offsets, packed


def unpack_entries(
    rows: tuple[np.ndarray, np.ndarray],
    kept: np.ndarray | None,
    widths: tuple[int, int],
    most: int,
    table: np.ndarray,
    *,
    shared: bool,
) -> Entries:
    """What ``pack_entries`` had; ``kept`` (int32 [rows]) None: every entry has a value. ``table`` (float32 [256] or [65536]) says
    which weight a value stands for.

    ``shared``: entries without a weight share what the others leave; see ``kernels.lay_out``.

    Raises:
        PayloadError: a row that is no whole number of entries long, has more than ``most``, or fewer than ``kept``.
    """
    from kdscale.targets import kernels

    offsets, flat = rows
    lengths = offsets[1:] - offsets[:-1]
    every = kept is None
    if kept is None:
        kept = lengths // sum(widths)
    own = kept * widths[1]
    count = (lengths - own) // widths[0]
    whole = bool((count * widths[0] + own == lengths).all()) and bool((kept <= count).all())
    whole &= not every or bool((kept == count).all())
    _require(whole and count.max(initial=0) <= most, f"a row of entries is as long as no row of at most {most} is")
    _require(len(table) == 1 << 8 * widths[1], f"values of {widths[1]} bytes stand for {len(table)} weights")
    ids_TK = np.zeros((len(count), int(count.max(initial=0))), np.int32)
    weights_TK, mass_T = np.zeros(ids_TK.shape, np.float32), np.zeros(len(count), np.float64)
    largest = kernels.lay_out(flat, count, kept, *widths, table, shared, ids_TK, weights_TK, mass_T)
    return Entries(ids_TK, weights_TK, count, kept, mass_T, largest)


def encode_between(logp_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 codes [T, K] below 16, uint8 ends [T, 2]) of log-probabilities: even steps on the tenth root of the probability
    from the row's least to its largest. So the likeliest entry is as exact as the ends, which are ``encode_logp``'s."""
    ends_T2 = encode_logp(torch.stack([logp_TK.amin(-1), logp_TK.amax(-1)], -1))
    low_T, step_T = _between(ends_T2)
    root_TK = logp_TK.mul(_FLAT_ROOT).exp_()
    return root_TK.sub_(low_T).div_(step_T).round_().clamp_(0, _FEW_LEVELS).to(torch.uint8), ends_T2


@cache
def _levels_between() -> tuple[np.ndarray, np.ndarray]:
    """(log-probabilities, probabilities), float32 [65536, 16], that each code stands for between ends ``(low, high)``, in row
    ``256 low + high``: 4 MiB each, of which real rows use little, and no logarithm for every row that arrives."""
    codes = torch.arange(_LEVELS + 1, dtype=torch.uint8)
    low_T, step_T = _between(torch.cartesian_prod(codes, codes))
    logp = _CODES.mul(step_T).add_(low_T).log_().div_(_FLAT_ROOT)
    return logp.numpy(), logp.exp().numpy()


def sum_between(packed: np.ndarray, ends: np.ndarray, count: int) -> torch.Tensor:
    """Sum of the ``count`` probabilities that each row of ``encode_between``'s codes (as ``pack_nibbles`` leaves them) and ends
    stands for: float32 [T].

    Raises:
        PayloadError: rows of another length.
    """
    from kdscale.targets import kernels

    _require_nibbles(packed, ends, count)
    sums_T = torch.empty(len(packed), dtype=torch.float32)
    kernels.sums_of_levels(packed, ends, _levels_between()[1], count, sums_T.numpy())
    return sums_T


def decode_between(
    packed: np.ndarray, ends: np.ndarray, excess_T: torch.Tensor, count: int, first: np.ndarray
) -> torch.Tensor:
    """The log-probabilities less ``excess_T`` (float32 [T]), at most 0: float32 [T, count]; entry ``first[r]`` of row r and the
    one in front have changed places.

    Raises:
        PayloadError: rows of another length; ``first`` is none of the entries.
    """
    from kdscale.targets import kernels

    _require_nibbles(packed, ends, count)
    _require_first(first, count)
    found_TK = torch.empty(len(packed), count, dtype=torch.float32)
    kernels.levels(packed, ends, _levels_between()[0], excess_T.numpy(), first, found_TK.numpy())
    return found_TK


def _require_nibbles(packed: np.ndarray, ends: np.ndarray, count: int) -> None:
    _require(packed.shape == (len(ends), -(-count // 2)) and ends.shape[1:] == (2,), "rows of values are cut")


def _require_first(first: np.ndarray, count: int) -> None:
    inside = not len(first) or (first.min() >= 0 and first.max() < count)
    _require(bool(inside), f"the likeliest of {count} entries is none of them")


def _require(fine: bool, otherwise: str) -> None:
    if not fine:
        raise PayloadError(otherwise)


def _between(ends_T2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(tenth root of the row's least probability [T, 1], the step from level to level [T, 1])."""
    low_T, high_T = decode_logp(ends_T2).mul_(_FLAT_ROOT).exp_().split(1, dim=-1)
    return low_T, (high_T - low_T).clamp_min(torch.finfo(torch.float32).tiny) / _FEW_LEVELS


def quantize_rows(values_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [T, D], float32 scale [T]): values are ``scale`` times the integers, within half a scale."""
    scale_T = torch.empty(len(values_TD), dtype=torch.float32)
    found_TD = torch.empty(values_TD.shape, dtype=torch.int8)
    for start in range(0, len(scale_T), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        values = values_TD[part].float()
        scale_T[part] = values.abs().amax(-1).clamp_min_(torch.finfo(torch.float32).tiny) / 127
        found_TD[part] = values.div(scale_T[part, None]).round_()
    return found_TD, scale_T


def dequantize_rows(values_TD: torch.Tensor, scale_T: torch.Tensor) -> torch.Tensor:
    """bfloat16 values of ``quantize_rows``'s result."""
    found_TD = torch.empty(values_TD.shape, dtype=torch.bfloat16)
    for start in range(0, len(scale_T), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        found_TD[part] = values_TD[part].float().mul_(scale_T[part, None])
    return found_TD
