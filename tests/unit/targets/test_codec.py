"""Ids and probabilities as byte-aligned planes, and back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.errors import PayloadError
from kdscale.targets.codec import (
    decode_between,
    decode_logp,
    encode_logp,
    pack_entries,
    pack_ids,
    pack_nibbles,
    pack_sorted,
    quantize_rows,
    sum_between,
    unpack_entries,
    unpack_ids,
    unpack_sorted,
    weights_of_halves,
)


def exchanged(rows: np.ndarray, first: np.ndarray) -> np.ndarray:
    """In each row the entry ``first`` and the one in front changed."""
    rows = rows.copy()
    for row, place in zip(rows, first, strict=True):
        row[[0, place]] = row[[place, 0]]
    return rows


@given(st.integers(0, 20), st.sampled_from([300, 5_000, 49_152, 140_000]), st.integers(1, 200), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_sorted_ids_round_trip(rows: int, vocab: int, count: int, seed: int):
    generator = np.random.default_rng(seed)
    ids = np.sort([generator.choice(vocab, count, replace=False) for _ in range(rows)]).astype(np.int32)
    ids = ids.reshape(rows, count)
    planes = pack_sorted(ids, vocab)
    assert np.array_equal(unpack_sorted(planes, count, vocab, np.zeros(rows, np.int64)), ids)
    first = generator.integers(0, count, rows)
    assert np.array_equal(unpack_sorted(planes, count, vocab, first), exchanged(ids, first))
    if rows:
        with pytest.raises(PayloadError, match=f"of {count} entries is none"):
            unpack_sorted(planes, count, vocab, first + count)
        bits = 8 * sum(plane.shape[1] for plane in planes)
        assert bits <= count * (2 + max(8, np.log2(vocab / count))) + vocab / 256 + 16
        # One bit of the bitmap flipped: another count of ids, in this row and in all.
        planes[1][rows // 2, 0] ^= 1
        with pytest.raises(PayloadError, match=f"does not name {count}"):
            unpack_sorted(planes, count, vocab, first)


@given(st.integers(0, 5), st.integers(1, 33), st.integers(0, 99))
def test_levels_between_ends(rows: int, count: int, seed: int):
    """Against float64 from the definition: even steps on the tenth root between the ends, which are fourth roots in 255ths."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 16, (rows, count), dtype=np.uint8)
    ends = np.sort(random.integers(0, 256, (rows, 2), dtype=np.uint8), axis=1)
    packed = pack_nibbles(values)
    assert packed.shape == (rows, (count + 1) // 2)
    low, high = (np.maximum(ends.astype(np.float64), 0.5) / 255).T[..., None] ** 0.4
    logp = np.log(low + values * np.maximum(high - low, 1e-38) / 15) * 10
    first, excess = random.integers(0, count, rows), random.random(rows, np.float32)
    found = decode_between(packed, ends, torch.from_numpy(excess), count, first)
    np.testing.assert_allclose(found, exchanged(np.minimum(logp - excess[:, None], 0), first), atol=2e-4)
    np.testing.assert_allclose(sum_between(packed, ends, count), np.exp(logp).sum(1), rtol=2e-4)
    for wrong in (ends[:, :1], ends[:-1]):
        if rows:
            with pytest.raises(PayloadError, match="cut"):
                sum_between(packed, np.ascontiguousarray(wrong), count)
            with pytest.raises(PayloadError, match="cut"):
                decode_between(packed, np.ascontiguousarray(wrong), torch.from_numpy(excess), count, first)
    if rows:
        with pytest.raises(PayloadError, match=f"of {count} entries is none"):
            decode_between(packed, ends, torch.from_numpy(excess), count, first + count)


lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=9)


@given(lengths, st.sampled_from([2, 3, 4]), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 99))
def test_rows_of_unequal_length(
    lengths: list[tuple[int, int]], id_width: int, value_width: int, shared: bool, seed: int
):
    kept = np.array([min(pair) for pair in lengths], np.int32)
    count = np.array([max(pair) for pair in lengths], np.int32)
    random = np.random.default_rng(seed)
    ids = random.integers(0, min(1 << 8 * id_width, 1 << 31), (len(count), 6)).astype(np.int32)
    values = random.integers(0, 1 << 8 * value_width, ids.shape).astype(f"u{value_width}")
    table = random.random(1 << 8 * value_width, dtype=np.float32) / 3
    widths = (id_width, value_width)
    rows = pack_entries(ids, values, count, kept, widths)
    assert len(rows[1]) == id_width * count.sum() + value_width * kept.sum()
    found = unpack_entries(rows, kept, widths, 6, table, shared=shared)
    assert found.ids_TK.shape == found.weights_TK.shape == (len(count), max(count, default=0))
    assert found.count_T.tolist() == count.tolist()
    assert found.kept_T.tolist() == kept.tolist()
    assert found.largest == max((max(row[:used], default=0) for row, used in zip(ids, count, strict=True)), default=0)
    for row, (used, mine) in enumerate(zip(count, kept, strict=True)):
        behind = [0] * (found.ids_TK.shape[1] - used)
        assert found.ids_TK[row].tolist() == [*ids[row, :used], *behind]
        expected = table[values[row, :mine]].tolist()
        assert found.mass_T[row] == pytest.approx(sum(expected))
        if shared and mine < used and sum(expected) <= 1:
            expected += [(1 - sum(expected)) / (used - mine)] * (used - mine)
        elif shared and mine:
            expected = [one / sum(expected) for one in expected] + [0] * (used - mine)
        else:
            expected += [0] * (used - mine)
        assert found.weights_TK[row].tolist() == pytest.approx(expected + behind, rel=1e-5)


def test_rows_where_every_entry_has_a_value_need_no_counts():
    ids, values = np.array([[7, 9], [8, 0]], np.int32), np.array([[3, 1], [4, 0]], np.uint8)
    count = np.array([2, 1], np.int32)
    rows = pack_entries(ids, values, count, count, (2, 1))
    found = unpack_entries(rows, None, (2, 1), 2, np.arange(256, dtype=np.float32), shared=False)
    assert found.weights_TK.tolist() == [[3, 1], [4, 0]]
    assert found.count_T.tolist() == found.kept_T.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("offsets", "kept"), [([0, 6, 8], [1, 0]), ([0, 5, 8], [1, 3]), ([0, 0, 3], [1, 0]), ([0, 9, 9], [3, 0])]
)
def test_rows_that_hold_no_whole_entries_are_refused(offsets: list[int], kept: list[int]):
    rows, table = (np.array(offsets, np.int32), np.zeros(9, np.uint8)), np.zeros(256, np.float32)
    with pytest.raises(PayloadError, match="as long as no row of at most 2"):
        unpack_entries(rows, np.array(kept, np.int32), (2, 1), 2, table, shared=True)


def test_weights_of_halves():
    """NaN for bits that are no log-probability; else what float64 says, to float32's rounding."""
    logp = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)
    fine = np.isfinite(logp) & (logp <= 0)
    found = weights_of_halves()
    assert np.isnan(found[~fine]).all()
    np.testing.assert_allclose(found[fine], np.exp(logp[fine]), rtol=1e-6, atol=1e-30)


def test_int8_rows_are_within_half_a_step():
    values = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1], [50], [0], [7]]
    )
    integers, scale = quantize_rows(values)
    assert ((integers.float() * scale[:, None] - values).abs() <= 0.5001 * scale[:, None]).all()


def test_probability_codes():
    """All 256 codes stand for themselves, and a code's probability lies in the middle of its step."""
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(encode_logp(decode_logp(codes))[1:], codes[1:])
    assert float(decode_logp(torch.tensor([255], dtype=torch.uint8))) == 0
    assert torch.isfinite(decode_logp(codes)).all()


@pytest.mark.parametrize("vocab", [65_536, 65_537, 131_073, 262_145, 1 << 24, (1 << 24) + 1])
def test_id_planes(vocab: int):
    ids = np.array([[0, vocab - 1, vocab // 2]], np.int32)
    np.testing.assert_array_equal(unpack_ids(pack_ids(ids, vocab), vocab), ids)
