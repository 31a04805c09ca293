"""How long training stands still for a checkpoint of the quickstart's student, model and optimizer.

    bash launch/quickstart.sh --inputs     # once: fetches the teacher
    python -m tests.benchmarks.checkpoint [--model DIR] [--dtype float32] [--json checkpoint.json]

``background``: kdscale's saver, until training may go on; what it writes meanwhile is waited for outside the time, and ends
in a manifest that verifies. ``synchronous``, the control: the same state through DeepSpeed's own engine, then fsync and
sha256 of every file, as a save that is as durable must. One process each, ZeRO-1 over one rank, 2 threads, AdamW's states
made by a step, glibc as student ranks have it (blocks are kept). The files' bytes are compared first.
"""

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.turns import Side, agree, compare, machine, serve

MODEL = Path("models/SmolLM2-135M-Instruct")
ENVIRONMENT = {
    # As cluster/ranks.py gives it to ranks on CPUs.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "2",
    "DS_ACCELERATOR": "cpu",
    "PYTHONWARNINGS": "ignore",
}
ROUNDS = 8


def make_engine(model: Path, dtype_name: str) -> Any:
    """The quickstart's student after one step."""
    import torch

    from kdscale.config import load_config
    from kdscale.engine import process
    from kdscale.engine.models import build_student
    from kdscale.engine.settings import student_settings
    from kdscale.engine.training import training_engine

    process.set_threads(2, deterministic=False)
    member = process.Member(0, 1)
    member.join(member.open_store("127.0.0.0/8", None), "127.0.0.0/8", None, 60.0, 60.0, 0)
    config = load_config("configs/quickstart.yaml", [f"teacher.model={model}", f"student.dtype={dtype_name}"])
    dtype = process.resolve_dtype(config.student.dtype, torch.device("cpu"))
    settings = student_settings(config, str(dtype).removeprefix("torch."))
    engine = training_engine(build_student(config.student, model, dtype), settings)
    ids = torch.arange(32).repeat(config.train.micro_rows, 1)
    engine.backward(engine(input_ids=ids, use_cache=False).logits.float().square().mean())
    engine.step()
    return engine


def bytes_below(directory: Path) -> float:
    return float(sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()))


Work = Callable[[], dict[str, float]]


def background(engine: Any, root: Path) -> tuple[Work, Callable[[], None]]:
    """(what is timed, what is waited for)."""
    from kdscale.engine.checkpoint import verify
    from kdscale.engine.saver import Saver

    saver = Saver(engine, root, 0, rank=0, world=1, keep=2, limit_s=600.0)
    step = 0

    def wait() -> None:
        outcome = saver.wait()
        assert outcome is not None
        assert outcome.fault == "", outcome
        verify(outcome.directory)

    def save() -> dict[str, float]:
        nonlocal step
        step += 1
        saver.begin(step, identity={}, notes={})
        return {}

    save()
    wait()
    size = bytes_below(root / "step-1")
    return lambda: save() | {"bytes": size}, wait


def synchronous(engine: Any, root: Path) -> tuple[Work, Callable[[], None]]:
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    engine.checkpoint_engine = TorchCheckpointEngine()
    # An instance's own, which hides DeepSpeed's.
    del engine._copy_recovery_script

    def save() -> dict[str, float]:
        engine.save_checkpoint(str(root), tag="shards", save_latest=False)
        for path in root.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    hashlib.file_digest(file, "sha256")
        return {"bytes": bytes_below(root)}

    return save, lambda: shutil.rmtree(root)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        make = {"background": background, "synchronous": synchronous}[arguments.side]
        work, afterwards = make(make_engine(arguments.model, arguments.dtype), arguments.root)
        serve(work, afterwards=afterwards)
        return
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory(prefix="kdscale-benchmark-") as temporary:
        sides = [
            Side(
                name,
                [name, "--root", f"{temporary}/{name}", "--model", str(arguments.model), "--dtype", arguments.dtype],
            )
            for name in ("background", "synchronous")
        ]
        compare("tests.benchmarks.checkpoint", sides, arguments.rounds)
    # The control writes the frozen embedding as well, which the saver leaves to its digest.
    agree(sides, "bytes", 0.15)
    ours, control = sides
    for side in sides:
        print(f"{side.name:12} {side.median:6.3f} s ±{side.spread:.0%}  ({side.figures['bytes'] / 2**20:.0f} MiB)")
    share = ours.median / control.median
    print(f"training stands still for {share:.1%} of a synchronous save")
    if arguments.json:
        result = {"dtype": arguments.dtype, "sides": [side.as_dict() for side in sides], "stall_of_synchronous": share}
        arguments.json.write_text(json.dumps(result | {"machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
