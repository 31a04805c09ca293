"""The columns of each payload, and so its bytes. No torch.

Every column is without nulls, one value per position; a plane of K entries is one fixed-size binary. ``sampled`` alone has
rows of unequal length: a peaked distribution needs few entries. Hidden states of layers, where they are asked for, are columns
behind those of any payload.
"""

import json
import math
from functools import lru_cache

import pyarrow as pa

from kdscale.errors import PayloadError
from kdscale.spec import ENCODINGS, Encoding, TargetSpec

VERSION = 4


@lru_cache(maxsize=64)
def schema(spec: TargetSpec, vocab_size: int, hidden_size: int) -> pa.Schema:
    """The Arrow schema of a payload. Its metadata says what the numbers mean, so a recording explains itself.

    Raises:
        PayloadError: an encoding that the payload does not have, layers not ascending from 0, or numbers that mean nothing.
    """
    if spec.payload in ("topk", "sampled") and spec.k < 1:
        raise PayloadError(f"payload {spec.payload} with k = {spec.k} names nothing; ask for 1 or more")
    if not 0 < spec.temperature < math.inf:
        raise PayloadError(f"temperature {spec.temperature} softens nothing; ask for a finite one above 0")
    if not 0 <= spec.seed < 1 << 63:
        raise PayloadError(f"seed {spec.seed} is none; it must be from 0 to 2^63 - 1")
    layers = spec.layers
    if list(layers) != sorted(set(layers)) or min(layers, default=0) < 0:
        raise PayloadError(f"layers {list(layers)} cannot be asked for; name each once, ascending, from 0 on")
    if spec.layers_encoding not in ENCODINGS["hidden"]:
        raise PayloadError(
            f"layers cannot be encoded as {spec.layers_encoding}; choose {' or '.join(ENCODINGS['hidden'])}"
        )
    if spec.encoding not in ENCODINGS[spec.payload]:
        raise PayloadError(
            f"payload {spec.payload} cannot be encoded as {spec.encoding}; choose {' or '.join(ENCODINGS[spec.payload])}"
        )
    meta = {"kdscale": json.dumps({"version": VERSION, "vocab_size": vocab_size, **spec.as_dict()}, sort_keys=True)}
    fields: list[tuple[str, pa.DataType]] = [("label", pa.uint16() if vocab_size <= 1 << 16 else pa.int32())]
    k = min(spec.k, vocab_size)
    match spec.payload:
        case "topk":
            if spec.encoding == "uint4":
                fields += [("ids_low", pa.binary(low_bytes(k, vocab_size)))]
                fields += [("ids_bitmap", pa.binary(bitmap_bytes(k, vocab_size)))]
                fields += [("value", pa.binary(-(-k // 2))), ("ends", pa.binary(2))]
                fields += [("first", _count_type(k)), ("tail", pa.uint8())]
            else:
                fields.append(("ids_low", pa.binary(2 * k)))
                if high_bytes(k, vocab_size):
                    fields.append(("ids_high", pa.binary(high_bytes(k, vocab_size))))
                fields += [("value", pa.binary(value_bytes(spec) * k)), ("tail_logp", pa.float16())]
            if spec.temperature != 1.0:
                fields.append(("shift", pa.float32()))
            fields.append(("entropy", pa.float16()))
        case "sampled":
            fields.append(("entries", pa.binary()))
            # Draws with replacement all have a count of their own.
            if spec.sampler == "threshold":
                fields.append(("kept", _count_type(k)))
            fields.append(("entropy", pa.float16()))
        case "hidden":
            fields += hidden_fields("hidden", spec.encoding, hidden_size)
        case "dense":
            fields.append(("logp", pa.binary(4 * vocab_size)))
    for layer in spec.layers:
        fields += hidden_fields(layer_column(layer), spec.layers_encoding, hidden_size)
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields], metadata=meta)


def hidden_fields(name: str, encoding: Encoding, hidden_size: int) -> list[tuple[str, pa.DataType]]:
    """The columns of hidden states: one of numbers, and for int8 one of scales."""
    if encoding == "bfloat16":
        return [(name, pa.binary(2 * hidden_size))]
    return [(name, pa.binary(hidden_size)), (scale_column(name), pa.float32())]


def layer_column(layer: int) -> str:
    """Name of the column with a layer's hidden states."""
    return f"layer_{layer}"


def scale_column(name: str) -> str:
    """Name of the column with the scales of int8 hidden states."""
    return "scale" if name == "hidden" else f"{name}_scale"


@lru_cache(maxsize=64)
def schema_bytes(spec: TargetSpec, vocab_size: int, hidden_size: int) -> bytes:
    """``schema`` as it is serialized: part of every checksum."""
    serialized: bytes = schema(spec, vocab_size, hidden_size).serialize().to_pybytes()
    return serialized


def row_bytes(spec: TargetSpec, vocab_size: int, hidden_size: int) -> int:
    """Bytes of one position (``sampled``: at most); messages add some 300 bytes for every batch of hundreds of positions."""
    fixed = [field.type for field in schema(spec, vocab_size, hidden_size) if field.type != pa.binary()]
    size = sum(width(kind) for kind in fixed)
    if spec.payload == "sampled":
        size += 4 + min(spec.k, vocab_size) * (id_bytes(vocab_size) + value_bytes(spec))
    return size


def count_dtype(most: int) -> str:
    """NumPy's name of the type that counts to ``most``, or of an index into so many."""
    return "u1" if most < 1 << 8 else "<u2"


def _count_type(most: int) -> pa.DataType:
    return pa.uint8() if most < 1 << 8 else pa.uint16()


def id_bytes(vocab_size: int) -> int:
    """Bytes of an id in a row of entries."""
    return max(2, -(-(max(vocab_size, 2) - 1).bit_length() // 8))


def value_bytes(spec: TargetSpec) -> int:
    """Bytes of a probability, or of a count of draws."""
    if spec.payload == "sampled" and spec.sampler == "replacement":
        return 1 if spec.k < 1 << 8 else 2
    return 1 if spec.encoding == "uint8" else 2


def high_bits(vocab_size: int) -> int:
    """Bits of an id's high plane: 0 up to 2^16 ids, then the next of 1, 2, 4, 8, 16 that is enough."""
    needed = max(0, (max(vocab_size, 1) - 1).bit_length() - 16)
    return next(bits for bits in (0, 1, 2, 4, 8, 16) if bits >= needed)


def high_bytes(count: int, vocab_size: int) -> int:
    """Bytes of the high plane of ``count`` ids."""
    return -(-count * high_bits(vocab_size) // 8)


def low_bits(count: int, vocab_size: int) -> int:
    """Low bits of sorted ids, 8 or 12: whichever makes low bits and bitmap smaller."""
    return min((8, 12), key=lambda bits: count * bits + 8 * _bitmap_bytes(count, vocab_size, bits))


def low_bytes(count: int, vocab_size: int) -> int:
    """Bytes of the low bits of ``count`` sorted ids."""
    return count + (-(-count // 2) if low_bits(count, vocab_size) == 12 else 0)


def bitmap_bytes(count: int, vocab_size: int) -> int:
    """Bytes of the bitmap of ``count`` sorted ids."""
    return _bitmap_bytes(count, vocab_size, low_bits(count, vocab_size))


def _bitmap_bytes(count: int, vocab_size: int, bits: int) -> int:
    return -(-(count + (max(vocab_size, 1) - 1 >> bits)) // 8)


def width(kind: pa.DataType) -> int:
    return kind.byte_width if pa.types.is_fixed_size_binary(kind) else kind.bit_width // 8
