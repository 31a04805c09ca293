"""Byte-aligned planes for token ids and probabilities: decoding is a few vector operations, in NumPy or torch.

Ids: 16 low bits, and a plane of 1, 2, 4, 8 or 16 high bits where the vocabulary needs them. Probabilities: float16
log-probabilities, or one byte for the fourth root of the probability.
"""

import numpy as np
import torch

from kdscale.targets.layout import high_bits, high_bytes

_LEVELS = 255
# KL error of rounding a probability p by its logarithm's error d is p d^2 / 2 in sum. A uniform grid on p^a makes it
# p^(1-2a) / a^2 an entry: a = 1/4 weighs the few likely and the many unlikely entries of real distributions about evenly,
# and needs no parameters in the row.
_ROOT = 0.25
_LOG_OF_CODE = torch.from_numpy(
    np.log(np.maximum(np.arange(_LEVELS + 1), 0.5, dtype=np.float64) / _LEVELS).astype(np.float32) / np.float32(_ROOT)
)


def pack_ids(ids: np.ndarray, vocab_size: int) -> list[np.ndarray]:
    """Split int32 ids [rows, count] into their planes, low first."""
    planes: list[np.ndarray] = [(ids & 0xFFFF).astype(np.uint16)]
    bits = high_bits(vocab_size)
    high = ids >> 16
    if bits == 16:
        planes.append(high.astype(np.uint16))
    elif bits:
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
    """Log-probabilities, float32, of ``encode_logp``'s codes: within 2 / code of the original for codes above 0."""
    return _LOG_OF_CODE.index_select(0, codes.reshape(-1).int()).view(codes.shape)


def quantize_rows(values_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [T, D], float32 scale [T]): values are ``scale`` times the integers, within half a scale."""
    scale_T = values_TD.float().abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return (values_TD.float() / scale_T[:, None]).round_().to(torch.int8), scale_T


def dequantize_rows(values_TD: torch.Tensor, scale_T: torch.Tensor) -> torch.Tensor:
    """bfloat16 values of ``quantize_rows``'s result."""
    return (values_TD.float() * scale_T[:, None]).bfloat16()
