"""The sharded teacher against the same model whole, by core, over requests of a rank that share a forward.

    bash launch/quickstart.sh --inputs     # once: fetches the teacher
    python -m tests.benchmarks.teacher --json teacher.json

Each side is two processes of one thread that score at the same time, so that both share the machine alike: ``zero3``, one
engine over the two (half of the parameters each), against ``whole``, the model in each (the control). A forward is
everything from token rows to top-64 targets: every block's weights are gathered once for all its requests.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tests.benchmarks.turns import ROOT, Side, compare, machine, serve

MODEL = "models/SmolLM2-135M-Instruct"
SIZES = ("1x1024", "8x1024", "1x8192")
COLUMNS, ROUNDS = 256, 7


def rank_of(side: str, size: str, rank: int, port_file: Path) -> None:
    from kdscale.batch import TokenBatch
    from kdscale.engine.settings import teacher_settings
    from kdscale.engine.sharding import InferenceModel
    from kdscale.spec import TargetSpec
    from kdscale.teacher.model import Score, TeacherModel
    from tests.distributed.launch import join

    torch.set_num_threads(1)
    device = join(rank, 2, port_file)
    settings = teacher_settings(2 if side == "zero3" else 1, "bfloat16")
    model = TeacherModel(InferenceModel(MODEL, settings, torch.bfloat16, device), 49_152, device)
    requests, tokens = sizes(size)
    shape = (tokens // COLUMNS, COLUMNS)
    predicts = np.ones(shape, bool)
    predicts[:, -1] = False
    draw = np.random.default_rng(rank)
    batches = [
        TokenBatch(
            number=number,
            ids_RL=draw.integers(0, 49_152, shape, dtype=np.int32),
            segments_RL=np.ones(shape, np.int32),
            positions_RL=np.repeat(np.arange(COLUMNS, dtype=np.int32)[None], shape[0], 0),
            predicts_RL=predicts,
        )
        for number in range(requests)
    ]
    work = [Score(batch, TargetSpec("topk", 64)) for batch in batches]
    go = torch.zeros(1)

    def forward() -> dict[str, float]:
        dist.broadcast(go.fill_(1), 0)
        model.forward([*work])
        dist.barrier()
        return {}

    if rank == 0:
        serve(forward)
        dist.broadcast(go.fill_(0), 0)
        return
    while True:
        dist.broadcast(go, 0)
        if not go:
            return
        model.forward([*work])
        dist.barrier()


def sizes(size: str) -> tuple[int, int]:
    """(requests, tokens of each)."""
    requests, tokens = size.split("x")
    return int(requests), int(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", nargs="*", default=SIZES, help="REQUESTSxTOKENS of a rank and forward")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rank:
        rank_of(arguments.side, arguments.sizes[0], int(arguments.rank[0]), Path(arguments.rank[1]))
        return
    if arguments.side:
        with tempfile.TemporaryDirectory(prefix="kdscale-benchmark-") as temporary:
            port_file = Path(temporary) / "port"
            shared = ["--side", arguments.side, "--sizes", arguments.sizes[0]]
            other = [sys.executable, "-m", "tests.benchmarks.teacher", *shared, "--rank", "1", str(port_file)]
            process = subprocess.Popen(other, cwd=ROOT, stdin=subprocess.DEVNULL)
            try:
                rank_of(arguments.side, arguments.sizes[0], 0, port_file)
                process.wait(timeout=60)
            finally:
                process.kill()
        return
    rows = []
    for size in arguments.sizes:
        requests, each = sizes(size)
        tokens = requests * each
        sides = [Side(name, [name, "--sizes", size]) for name in ("zero3", "whole")]
        compare("tests.benchmarks.teacher", sides, ROUNDS)
        sharded, whole = sides
        rows.append({"requests": requests, "tokens_each": each, "zero3_of_whole": whole.median / sharded.median})
        rows[-1] |= {side.name: side.as_dict() | {"tokens_per_second": tokens / side.median} for side in sides}
        print(
            f"{requests} x {each:5} tokens a rank and forward: {tokens / sharded.median:5.0f} tokens/s and core"
            f" ±{sharded.spread:.0%}, whole {tokens / whole.median:5.0f} ±{whole.spread:.0%}:"
            f" {whole.median / sharded.median:.2f}x",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
