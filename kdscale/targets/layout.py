"""The columns of each payload, and so its bytes. No torch.

Every column is fixed-width and without nulls, one value per position; a plane of K entries is one fixed-size binary.
"""

import json

import pyarrow as pa

from kdscale.errors import PayloadError
from kdscale.spec import ENCODINGS, TargetSpec

VERSION = 2


def schema(spec: TargetSpec, vocab_size: int, hidden_size: int) -> pa.Schema:
    """The Arrow schema of a payload. Its metadata says what the numbers mean, so a recording explains itself.

    Raises:
        PayloadError: an encoding that the payload does not have.
    """
    if spec.encoding not in ENCODINGS[spec.payload]:
        raise PayloadError(
            f"payload {spec.payload} cannot be encoded as {spec.encoding}; choose {' or '.join(ENCODINGS[spec.payload])}"
        )
    meta = {"kdscale": json.dumps({"version": VERSION, "vocab_size": vocab_size, **spec.as_dict()}, sort_keys=True)}
    fields: list[tuple[str, pa.DataType]] = [("label", pa.uint16() if vocab_size <= 1 << 16 else pa.int32())]
    k = min(spec.k, vocab_size)
    match spec.payload:
        case "topk" | "sampled":
            fields.append(("ids_low", pa.binary(2 * k)))
            if high_bytes(k, vocab_size):
                fields.append(("ids_high", pa.binary(high_bytes(k, vocab_size))))
            if spec.payload == "sampled" and spec.sampler == "replacement":
                fields.append(("count", pa.binary(2 * k)))
            else:
                fields.append(("value", pa.binary((2 if spec.encoding == "float16" else 1) * k)))
            if spec.payload == "topk":
                fields.append(("tail_logp", pa.float16()))
                if spec.temperature != 1.0:
                    fields.append(("shift", pa.float32()))
            elif spec.sampler == "threshold":
                fields.append(("kept", pa.uint16()))
            fields.append(("entropy", pa.float16()))
        case "hidden" if spec.encoding == "bfloat16":
            fields.append(("hidden", pa.binary(2 * hidden_size)))
        case "hidden":
            fields += [("hidden", pa.binary(hidden_size)), ("scale", pa.float32())]
        case "dense":
            fields.append(("logp", pa.binary(4 * vocab_size)))
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields], metadata=meta)


def row_bytes(spec: TargetSpec, vocab_size: int, hidden_size: int) -> int:
    """Bytes of one position; messages add some 300 bytes for every batch of hundreds of positions."""
    return sum(width(field.type) for field in schema(spec, vocab_size, hidden_size))


def high_bits(vocab_size: int) -> int:
    """Bits of an id's high plane: 0 up to 2^16 ids, then the next of 1, 2, 4, 8, 16 that is enough."""
    needed = max(0, (max(vocab_size, 1) - 1).bit_length() - 16)
    return next(bits for bits in (0, 1, 2, 4, 8, 16) if bits >= needed)


def high_bytes(count: int, vocab_size: int) -> int:
    """Bytes of the high plane of ``count`` ids."""
    return -(-count * high_bits(vocab_size) // 8)


def width(kind: pa.DataType) -> int:
    return kind.byte_width if pa.types.is_fixed_size_binary(kind) else kind.bit_width // 8
