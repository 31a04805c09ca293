"""Byte-aligned planes for token ids: 16 low bits always, 8 or 16 high bits only where the vocabulary needs them."""

import numpy as np


def high_bytes(vocab_size: int) -> int:
    """Bytes of the high plane: 0 up to 2^16 ids, 1 up to 2^24, else 2."""
    return 0 if vocab_size <= 1 << 16 else 1 if vocab_size <= 1 << 24 else 2


def topk_bytes(k: int, vocab_size: int) -> int:
    """Bytes of one position's ``topk`` payload: id planes, float16 log-probabilities, tail, entropy and label.

    Messages add some 300 bytes for every batch of hundreds of positions.
    """
    k = min(k, vocab_size)
    return k * (2 + high_bytes(vocab_size)) + 2 * k + 4 + 4 + 4


def pack_ids(ids: np.ndarray, vocab_size: int) -> list[np.ndarray]:
    """Split int32 ids into their planes, low first."""
    planes = [(ids & 0xFFFF).astype(np.uint16)]
    match high_bytes(vocab_size):
        case 1:
            planes.append((ids >> 16).astype(np.uint8))
        case 2:
            planes.append((ids >> 16).astype(np.uint16))
    return planes


def unpack_ids(planes: list[np.ndarray]) -> np.ndarray:
    """The int32 ids whose planes these are."""
    ids = planes[0].astype(np.int32)
    for high in planes[1:]:
        ids |= high.astype(np.int32) << 16
    return ids
