"""What this machine can multiply, fast or at all, told without torch."""

import platform
from pathlib import Path


def cpu_has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions (AVX512-BF16 or AMX); without them bfloat16 is slower than float32."""
    return bool({"avx512_bf16", "amx_bf16"} & _flags())


def cpu_sums_int8() -> bool:
    """Whether the processor adds int8 products up as they are. Of x86 those with VNNI do: before it two products were added in
    16 bits, which overflow."""
    return platform.machine() not in ("x86_64", "AMD64") or bool({"avx512_vnni", "avx_vnni", "amx_int8"} & _flags())


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())
