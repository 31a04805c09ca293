"""Where a pipeline is cut by time: what each module is measured to take, and the bounds that balance it."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import nn

from kdscale.engine.families import Activations

_ROUNDS = 3


@dataclass(frozen=True)
class Sample:
    """What the modules are measured with."""

    inputs: Activations
    """(ids [R, L], positions [R, L]) of one micro-batch."""
    before_head: Callable[[], None]
    """Called before each forward of the last module, which may need more than activations."""


def balanced(seconds: Sequence[float], stages: int) -> list[int]:
    """Bounds [stages + 1] of consecutive parts whose largest sum is as small as it can be."""
    # DeepSpeed's partition_balanced misses the best cut of [0.66, 0.31, 0.75, 0.25] into three.
    sums = [0.0, *accumulate(seconds)]
    # (largest sum, bounds) of the best cut of the first ``stop`` parts, for each ``stop``.
    best: list[tuple[float, list[int]]] = [(total, [0, stop]) for stop, total in enumerate(sums)]
    for _ in range(stages - 1):
        best = [
            min((max(best[cut][0], sums[stop] - sums[cut]), [*best[cut][1], stop]) for cut in range(stop + 1))
            for stop in range(len(sums))
        ]
    return best[-1][1]


def measured_seconds(modules: Sequence[nn.Module], sample: Sample, device: torch.device) -> list[float]:
    """Seconds of forward and backward of each module, as rank 0 measures them; every rank calls it and gets the same.

    The modules lie in host memory before and after, without gradients.
    """
    seconds = torch.zeros(len(modules), dtype=torch.float64, device=device)
    if dist.get_rank() == 0:
        seconds[:] = torch.tensor(_measure(modules, sample, device), dtype=torch.float64)
    dist.broadcast(seconds, 0)
    return seconds.tolist()


def _measure(modules: Sequence[nn.Module], sample: Sample, device: torch.device) -> list[float]:
    activations, positions = (one.to(device) for one in sample.inputs)
    found = []
    for number, module in enumerate(modules):
        last = number == len(modules) - 1
        module.to(device)
        took = []
        # The first warms up.
        for _ in range(_ROUNDS + 1):
            if last:
                sample.before_head()
            given = activations.detach().requires_grad_(activations.is_floating_point())
            began = time.perf_counter()
            outputs = module((given, positions))
            result = outputs if last else outputs[0]
            if result.requires_grad:
                result.sum().backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took.append(time.perf_counter() - began)
        found.append(statistics.median(took[1:]))
        if not last:
            activations = outputs[0].detach()
        module.zero_grad(set_to_none=True)
        module.to("cpu")
    return found
