"""Size, speed and memory of a model directory, measured in a process of its own (``python -m`` this module)."""

import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from kdscale.errors import ModelError

_ROWS, _COLUMNS, _ROUNDS = 2, 256, 3


@dataclass(frozen=True)
class Efficiency:
    """What a model costs to run here."""

    parameters: int
    bytes_on_disk: int
    tokens_per_second: float
    """Forward over 2 rows of 256 tokens, median of 3 rounds after one warm-up."""
    peak_memory_bytes: int
    """Peak resident memory of the process (on a GPU: peak allocated there)."""


def measure(directory: str, dtype: str, threads: int, device: str, limit_s: float) -> Efficiency:
    """Measure in a fresh process. Raises: ModelError when it fails or takes longer than ``limit_s``."""
    command = [sys.executable, "-m", "kdscale.evaluate.efficiency", directory, dtype, str(threads), device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=True)
    except subprocess.TimeoutExpired:
        raise ModelError(f"measuring {directory} took longer than {limit_s:g} s") from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ModelError(f"measuring {directory} failed: {last[0]}") from None
    return Efficiency(**json.loads(done.stdout.splitlines()[-1]))


def _measure_here(directory: str, dtype: str, threads: int, device: str) -> Efficiency:
    import torch

    from kdscale.engine.models import load_causal_lm

    torch.set_num_threads(threads)
    model = load_causal_lm(directory, getattr(torch, dtype)).eval()
    model.to(device)  # type: ignore[arg-type]
    ids = (
        torch.arange(_ROWS * _COLUMNS, device=device).view(_ROWS, _COLUMNS) % model.config.get_text_config().vocab_size
    )
    seconds = []
    with torch.no_grad():
        for _ in range(1 + _ROUNDS):
            start = time.perf_counter()
            # The logits' sum, read back, waits for a GPU to finish.
            float(model(input_ids=ids, use_cache=False).logits[:, -1].sum())
            seconds.append(time.perf_counter() - start)
    on_gpu = device != "cpu"
    return Efficiency(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes_on_disk=sum(path.stat().st_size for path in Path(directory).glob("*.safetensors")),
        tokens_per_second=_ROWS * _COLUMNS / statistics.median(seconds[1:]),
        peak_memory_bytes=torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_measure_here(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]))))
