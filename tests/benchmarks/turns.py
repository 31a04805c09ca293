"""Sides of a comparison, each in a process of its own, timed in turns A B A B: what disturbs one disturbs all.

A side is ``python -m tests.benchmarks.NAME --side ...``; it calls ``serve``. The benchmark itself calls ``compare``.
"""

import ctypes
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_MARK = "turns: "
MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_ARENA_MAX": "1"}
"""As cluster/ranks.py gives it to ranks on processors: large blocks are kept, not faulted in again for every message."""


def manage_memory_as_a_rank() -> None:
    """Start this program again under ``MEMORY``, which the C library reads only once."""
    if not MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, sys.orig_argv, os.environ | MEMORY)


def serve(
    work: Callable[[], dict[str, float]],
    owned_bytes: int | None = None,
    afterwards: Callable[[], None] = lambda: None,
) -> None:
    """A side's main loop: one line in, one round, one line out. ``work`` returns figures that other sides must agree with;
    ``afterwards`` follows each, outside the time, before the next side's turn.

    ``owned_bytes``: outputs and gradients that the work itself allocates, which are not transient; without it memory is not
    looked at. Work whose peak comes before they are there says so by ``not_yet_owned``.
    """
    figures = work()
    afterwards()
    transient = None
    if owned_bytes is not None:
        # The largest of several: what the kernel takes back meanwhile hides some of a peak.
        transient = max(_transient(work, owned_bytes) for _ in range(6))
    say(json.dumps({"figures": figures, "transient_bytes": transient}))
    for _ in sys.stdin:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
        afterwards()
        say(str(seconds))


def say(line: str) -> None:
    """From a side to the benchmark; libraries print what they like beside it."""
    print(f"{_MARK}{line}", flush=True)


_early_peaks: list[int] = []


def not_yet_owned() -> None:
    """Called by a side's work where nothing of ``owned_bytes`` is allocated: what was resident until now was all transient."""
    _early_peaks.append(_field(Path("/proc/self/status"), "VmHWM"))


def _transient(work: Callable[[], Any], owned_bytes: int) -> int:
    """Peak resident bytes of one call beyond what was resident before it, and what it owns once that is there."""
    gc.collect()
    _early_peaks.clear()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not what this call needs
    status = Path("/proc/self/status")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _field(status, "VmRSS")
    result = work()
    peak = _field(status, "VmHWM")
    del result
    return max(peak - owned_bytes, *_early_peaks, 0) - before


def _field(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@dataclass
class Side:
    """A row of the result: what it is, how it is run, and what it took."""

    name: str
    arguments: list[str]
    python: str = sys.executable
    seconds: list[float] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    transient_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        return spread(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "median_seconds": self.median,
            "spread": self.spread,
            "transient_bytes": self.transient_bytes,
            "figures": self.figures,
        }


def compare(module: str, sides: list[Side], rounds: int) -> None:
    """Run all sides in turns; fills in their seconds, figures and memory. A side that fails ends the benchmark."""
    processes: list[subprocess.Popen[str]] = []
    try:
        for side in sides:
            command = [side.python, "-m", module, "--side", *side.arguments]
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            processes.append(process)
            first = json.loads(_line(side, process))
            side.figures, side.transient_bytes = first["figures"], first["transient_bytes"]
        for round_number in range(rounds + 1):
            for side, process in zip(sides, processes, strict=True):
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                seconds = float(_line(side, process))
                if round_number:  # the first warms up
                    side.seconds.append(seconds)
        for side, process in zip(sides, processes, strict=True):
            assert process.stdin is not None
            process.stdin.close()  # a side may have something to leave
            if process.wait(timeout=120):
                raise SystemExit(f"side {side.name} ended with {process.returncode}")
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _line(side: Side, process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(_MARK):
            return line.removeprefix(_MARK)
    raise SystemExit(f"side {side.name} ended with {process.wait()}")


def alternate(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work, by name, in turns within this process, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for round_number in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if round_number:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def spread(seconds: list[float]) -> float:
    """Half the interquartile range over the median."""
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / 2 / middle


def agree(sides: list[Side], name: str, tolerance: float) -> None:
    """Values first: the sides compute the same thing, or the times mean nothing."""
    values = {side.name: side.figures[name] for side in sides if name in side.figures}
    low, high = min(values.values()), max(values.values())
    if high - low > tolerance * abs(high):
        raise SystemExit(f"{name} differs: {values}")


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    import platform

    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    return {
        "processor": model,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
