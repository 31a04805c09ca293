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


def _draws(kind: types.Type) -> Any:
    counts = _given(_I4, 1)
    return types.void(
        _given(kind, 1), _given(_F4, 1), counts, counts, types.boolean, _I4[:, ::1], _F4[:, ::1], _F8[::1]
    )


@_compiled(_draws(types.uint16), _draws(_I4))
def draws(
    values: np.ndarray,
    own: np.ndarray,
    used: np.ndarray,
    kept: np.ndarray,
    shared: bool,
    ids: np.ndarray,
    weights: np.ndarray,
    mass: np.ndarray,
) -> None:
    """Lay out rows of unequal length: the next ``used[r]`` of ``values`` in ``ids`` [rows, K], the next ``kept[r]`` of ``own`` in
    ``weights`` [rows, K], both zeros before; float64 ``mass`` [rows] is the sum of the latter.

    ``shared``: the used entries without a weight of their own share evenly what those leave of 1; where they leave nothing, or
    there are no others, the weights are divided by their sum.
    """
    width, start, own_start = ids.shape[1], 0, 0
    for r in range(len(ids)):
        taken = max(0, min(used[r], width, len(values) - start))
        own_taken = max(0, min(kept[r], taken, len(own) - own_start))
        total = 0.0
        for n in range(own_taken):
            total += own[own_start + n]
        mass[r] = total
        scale, rest = np.float32(1), np.float32(0)
        if shared and total > 0 and (own_taken == taken or total > 1):
            scale = np.float32(1 / total)
        elif shared and own_taken < taken:
            rest = np.float32((1 - total) / (taken - own_taken))
        # One loop: rows are short, and each loop that is made ready for vectors takes longer than a row.
        for n in range(taken):
            ids[r, n] = values[start + n]
            weight = rest
            if n < own_taken:
                weight = own[own_start + n] * scale
            weights[r, n] = weight
        start += taken
        own_start += own_taken
