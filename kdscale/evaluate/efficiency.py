"""Size, speed and memory of a model directory, measured in a process of its own (``python -m`` this module)."""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from kdscale.errors import ModelError
from kdscale.spec import Task

_ROWS, _COLUMNS, _ROUNDS = 2, 256, 3
_EXAMPLES, _TEXT_TOKENS = 32, 64


@dataclass(frozen=True)
class Efficiency:
    """What a model costs to run here."""

    parameters: int
    bytes_on_disk: int
    tokens_per_second: float
    """Forward over 2 rows of 256 tokens, median of 3 rounds after one warm-up. Of a classifier examples a second, over 32
    images, or texts of 64 tokens at most."""
    peak_memory_bytes: int
    """Peak resident memory of the process (on a GPU: peak allocated there)."""


def measure(directory: str, dtype: str, threads: int, device: str, limit_s: float, task: Task) -> Efficiency:
    """Measure in a fresh process. Raises: ModelError when it fails or takes longer than ``limit_s``."""
    command = [sys.executable, "-m", "kdscale.evaluate.efficiency", directory, dtype, str(threads), device, task]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=True)
    except subprocess.TimeoutExpired:
        raise ModelError(f"measuring {directory} took longer than {limit_s:g} s") from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ModelError(f"measuring {directory} failed: {last[0]}") from None
    return Efficiency(**json.loads(done.stdout.splitlines()[-1]))


def _measure_here(directory: str, dtype: str, threads: int, device: str, task: Task) -> Efficiency:
    import torch

    from kdscale.engine.models import load_model

    torch.set_num_threads(threads)
    model = load_model(directory, getattr(torch, dtype), task).eval()
    model.to(device)  # type: ignore[arg-type]
    (tokens_per_second,) = forward_rates([model], task)
    on_gpu = device != "cpu"
    return Efficiency(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        bytes_on_disk=sum(path.stat().st_size for path in Path(directory).glob("*.safetensors")),
        tokens_per_second=tokens_per_second,
        peak_memory_bytes=torch.cuda.max_memory_allocated()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def forward_rates(models: Sequence[Any], task: Task) -> list[float]:
    """``Efficiency.tokens_per_second`` of models with the same inputs, where they lie and in this process. They take turns, so
    that what else the machine does meets all of them."""
    import torch

    inputs, positions = _inputs(models[0].config, models[0].dtype, task)
    inputs = {name: tensor.to(models[0].device) for name, tensor in inputs.items()}
    seconds: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(1 + _ROUNDS):
            for model, its_seconds in zip(models, seconds, strict=True):
                start = time.perf_counter()
                # The logits' sum, read back, waits for a GPU to finish.
                float(model(**inputs).logits[:, -1].sum())
                its_seconds.append(time.perf_counter() - start)
    return [positions / statistics.median(its_seconds[1:]) for its_seconds in seconds]


def _inputs(config: Any, dtype: Any, task: Task) -> tuple[dict[str, Any], int]:
    """(arguments of a forward, its positions)."""
    import torch

    if task == "image-classification":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(_EXAMPLES, config.num_channels, height, width, dtype=dtype)}, _EXAMPLES
    text = config.get_text_config()
    rows, columns = (_ROWS, _COLUMNS) if task == "language-modelling" else (_EXAMPLES, _TEXT_TOKENS)
    columns = min(columns, getattr(text, "max_position_embeddings", columns))
    ids = torch.arange(rows * columns).view(rows, columns) % text.vocab_size
    return {"input_ids": ids}, ids.numel() if task == "language-modelling" else rows


if __name__ == "__main__":
    directory, dtype, threads, device, task = sys.argv[1:]
    print(json.dumps(asdict(_measure_here(directory, dtype, int(threads), device, cast(Task, task)))))
