"""Loops over packed entries, compiled when this file is imported: by the compact payloads alone, as numba takes its time.

Nothing that arrives is trusted: every index is bounded here by the shapes of the arrays, or by the codec before it calls.
r = row, n = entry of a row.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.cpython.unsafe.numbers import trailing_zeros

from kdscale import log

_LOG = log.get(__name__)
Function = Callable[..., Any]
_lowest_bit: Any = trailing_zeros


def _given(dtype: types.Type, dimensions: int) -> types.Array:
    return types.Array(dtype, dimensions, "C", readonly=True)


def _compiled(*signatures: Any) -> Callable[[Function], Function]:
    """Machine code of a function for ``signatures``, kept beside the source or in the user's cache directory."""

    def compiled(function: Function) -> Function:
        try:
            return njit(list(signatures), nogil=True, cache=True)(function)
        except (RuntimeError, OSError) as error:
            # Neither place can be written: this process compiles for itself.
            _LOG.debug("%s", error)
            return njit(list(signatures), nogil=True)(function)

    return compiled


_U1, _I4, _I8, _F4, _F8 = types.uint8, types.int32, types.int64, types.float32, types.float64
_U8 = np.uint64
"""Numbers without a sign: they are no index from the end, so what is found by one needs no second look."""


@_compiled(types.void(_given(_I4, 2), _I8, _U1[:, ::1]))
def set_places(ids: np.ndarray, bits: int, bitmap: np.ndarray) -> None:
    """Set bit ``(ids[r, n] >> bits) + n`` of row r of a ``bitmap`` of zeros, for every entry that it has room for."""
    for r in range(len(ids)):
        for n in range(ids.shape[1]):
            place = (ids[r, n] >> bits) + n
            if 0 <= place < 8 * bitmap.shape[1]:
                bitmap[r, place >> 3] |= 1 << (place & 7)


@njit(inline="always")
def _word(row: np.ndarray, start: int) -> np.uint64:
    """Eight bytes from ``start``, the first one lowest, zeros behind the row's end."""
    if start + 8 <= len(row):
        # Written out, the compiler makes one load of it.
        low = _U8(row[start]) | _U8(row[start + 1]) << _U8(8)
        low |= _U8(row[start + 2]) << _U8(16) | _U8(row[start + 3]) << _U8(24)
        high = _U8(row[start + 4]) << _U8(32) | _U8(row[start + 5]) << _U8(40)
        return low | high | _U8(row[start + 6]) << _U8(48) | _U8(row[start + 7]) << _U8(56)
    word = _U8(0)
    for index in range(len(row) - start):
        word |= _U8(row[start + index]) << _U8(8 * index)
    return word


@_compiled(types.boolean(_given(_U1, 2), _given(_U1, 2), _I8, _I8, _given(_I8, 1), _I4[:, ::1]))
def sorted_ids(low: np.ndarray, bitmap: np.ndarray, bits: int, count: int, first: np.ndarray, ids: np.ndarray) -> bool:
    """Fill int32 ``ids`` [rows, count] from ``codec.pack_sorted``'s planes, entry ``first[r]`` changed with the one in front.

    False, with ``ids`` half filled, for a bitmap that does not name ``count`` entries.
    """
    half, width = (count + 1) // 2, bitmap.shape[1]
    # Room for all bits, so that what is found needs no bound.
    places = np.empty(8 * width, np.int32)
    for r in range(len(bitmap)):
        found = _U8(0)
        for start in range(0, width, 8):
            word = _word(bitmap[r], start)
            while word:
                places[found] = 8 * start + np.int64(_lowest_bit(word))
                found += _U8(1)
                word &= word - _U8(1)
        if found != _U8(count):
            return False
        for n in range(count):
            ids[r, n] = (places[n] - n) << bits | low[r, n]
        if bits == 12:
            for n in range(half):
                ids[r, n] |= (low[r, count + n] & 15) << 8
            for n in range(half, count):
                ids[r, n] |= (low[r, count + n - half] >> 4) << 8
        ids[r, 0], ids[r, first[r]] = ids[r, first[r]], ids[r, 0]
    return True


@_compiled(
    types.void(_given(_U1, 2), _given(_U1, 2), _given(_F4, 2), _given(_F4, 1), _given(_I8, 1), _F4[:, ::1]),
)
def levels(
    packed: np.ndarray, ends: np.ndarray, table: np.ndarray, excess: np.ndarray, first: np.ndarray, found: np.ndarray
) -> None:
    """Fill float32 ``found`` [rows, count] with what the values of ``codec.pack_nibbles`` stand for in row ``256 ends[r, 0] +
    ends[r, 1]`` of ``table`` [65536, 16], less ``excess[r]``, at most 0; entry ``first[r]`` changed with the one in front."""
    count = found.shape[1]
    half = (count + 1) // 2
    own = np.empty(16, np.float32)
    for r in range(len(packed)):
        row = _U8(ends[r, 0]) << _U8(8) | _U8(ends[r, 1])
        for level in range(16):
            own[level] = min(table[row, level] - excess[r], np.float32(0))
        for n in range(count - half):
            found[r, n] = own[packed[r, n] & 15]
            found[r, half + n] = own[packed[r, n] >> 4]
        if count - half < half:
            found[r, half - 1] = own[packed[r, half - 1] & 15]
        found[r, 0], found[r, first[r]] = found[r, first[r]], found[r, 0]


@_compiled(types.void(_given(_U1, 2), _given(_U1, 2), _given(_F4, 2), _I8, _F4[::1]))
def sums_of_levels(packed: np.ndarray, ends: np.ndarray, table: np.ndarray, count: int, sums: np.ndarray) -> None:
    """Fill float32 ``sums`` [rows] with the sums of what ``levels`` finds in ``table``, nothing taken from it."""
    half = (count + 1) // 2
    for r in range(len(packed)):
        row = _U8(ends[r, 0]) << _U8(8) | _U8(ends[r, 1])
        below = above = np.float32(0)
        for n in range(count - half):
            below += table[row, packed[r, n] & 15]
            above += table[row, packed[r, n] >> 4]
        if count - half < half:
            below += table[row, packed[r, half - 1] & 15]
        sums[r] = below + above


def _packing(kind: types.Type) -> Any:
    counts = _given(_I4, 1)
    return types.void(_given(_I4, 2), _given(kind, 2), counts, counts, _I8, _I8, _U1[::1])


@_compiled(_packing(_U1), _packing(types.uint16))
def pack(
    ids: np.ndarray,
    values: np.ndarray,
    used: np.ndarray,
    kept: np.ndarray,
    id_bytes: int,
    value_bytes: int,
    packed: np.ndarray,
) -> None:
    """Fill ``packed`` with the first ``used[r]`` ids of each row, each of the first ``kept[r]`` with its value behind it, lowest
    bytes first, as far as there is room."""
    at = 0
    for r in range(len(ids)):
        for n in range(min(used[r], ids.shape[1])):
            own = n < kept[r]
            if at + id_bytes + own * value_bytes > len(packed):
                return
            for byte in range(id_bytes):
                packed[at + byte] = ids[r, n] >> (8 * byte)
            at += id_bytes
            if own:
                for byte in range(value_bytes):
                    packed[at + byte] = values[r, n] >> (8 * byte)
                at += value_bytes


@_compiled(
    types.int64(
        *(_given(_U1, 1), _given(_I4, 1), _given(_I4, 1), _I8, _I8, _given(_F4, 1), types.boolean),
        *(_I4[:, ::1], _F4[:, ::1], _F8[::1]),
    )
)
def lay_out(
    packed: np.ndarray,
    used: np.ndarray,
    kept: np.ndarray,
    id_bytes: int,
    value_bytes: int,
    table: np.ndarray,
    shared: bool,
    ids: np.ndarray,
    weights: np.ndarray,
    mass: np.ndarray,
) -> int:
    """Lay out what ``pack`` has packed, in ``ids`` and ``weights`` [rows, K], zeros before; ``table`` has the weights that values
    stand for. Float64 ``mass`` [rows] is the sum of a row's. Returns the largest id, taken as a number without a sign.

    ``shared``: the used entries without a weight of their own share evenly what the others leave of 1; where those leave
    nothing, or there are no others, the weights are divided by their sum.
    """
    at, largest = _U8(0), _U8(0)
    for r in range(len(ids)):
        taken = max(0, min(used[r], ids.shape[1]))
        own_taken = max(0, min(kept[r], taken))
        if np.int64(at) + taken * id_bytes + own_taken * value_bytes > len(packed):
            break
        total = 0.0
        # One loop, and numbers put together in place: rows are short, loops made ready for vectors take longer than a row,
        # and numba makes slower code of a function for it.
        for n in range(taken):
            word = _U8(packed[at]) | _U8(packed[at + _U8(1)]) << _U8(8)
            if id_bytes > 2:
                word |= _U8(packed[at + _U8(2)]) << _U8(16)
                if id_bytes > 3:
                    word |= _U8(packed[at + _U8(3)]) << _U8(24)
            ids[r, n] = np.int32(word)
            if word > largest:
                largest = word
            at += _U8(id_bytes)
            if n < own_taken:
                value = _U8(packed[at])
                if value_bytes == 2:
                    value |= _U8(packed[at + _U8(1)]) << _U8(8)
                weights[r, n] = table[value]
                total += table[value]
                at += _U8(value_bytes)
        mass[r] = total
        if shared and total > 0 and (own_taken == taken or total > 1):
            for n in range(own_taken):
                weights[r, n] *= np.float32(1 / total)
        elif shared and own_taken < taken:
            rest = np.float32((1 - total) / (taken - own_taken))
            for n in range(own_taken, taken):
                weights[r, n] = rest
    return int(largest)
