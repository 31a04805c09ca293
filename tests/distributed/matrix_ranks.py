"""Runs that are trained through and saved on the way, and, in later processes, gone on with from what was saved.

``first``: every case uninterrupted; then the last one again, until it is killed. ``again``: from the checkpoints, in a
student that began from other weights, to the end; every number must be the uninterrupted run's.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.distributed.launch import join, leave
from tests.distributed.tiny_run import Case, TinyRun


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_save(root: Path) -> None:
    """Be killed as soon as anything new lies below ``root`` besides what lies there now."""
    before = set(root.rglob("*")) if root.exists() else set()

    def watch() -> None:
        while not (set(root.rglob("*")) if root.exists() else set()) - before:
            time.sleep(0.0005)
        die()

    threading.Thread(target=watch, daemon=True).start()


def first(cases: list[Case], killed: str, rank: int, world: int, out: Path) -> None:
    for case in cases:
        run = TinyRun(case, rank, world, seed=0)
        steps = run.train(out / case.name / "checkpoints")
        run.save_state(out / case.name / f"end-{rank}.safetensors")
        (out / case.name / f"steps-{rank}.json").write_text(json.dumps(steps))
    case = cases[-1]
    root = out / case.name / "killed"
    run = TinyRun(case, rank, world, seed=0)
    match killed:
        case "in a step":
            run.train(root, interrupt=(case.save_at[0] + 1, die))
        case "in a save":
            run.train(root, interrupt=(case.save_at[1] - 1, lambda: die_in_a_save(root)))
    raise AssertionError("survived")


def again(cases: list[Case], rank: int, world: int, out: Path) -> None:
    for number, case in enumerate(cases):
        roots = ["checkpoints"] if number < len(cases) - 1 else ["checkpoints", "killed"]
        for root in roots:
            go_on(case, out / case.name, root, rank, world)


def go_on(case: Case, directory: Path, root: str, rank: int, world: int) -> None:
    run = TinyRun(case, rank, world, seed=1)
    way = run.resume(directory / root)
    assert way == "exact", case.name
    assert 0 < run.start < case.steps
    expected = json.loads((directory / f"steps-{rank}.json").read_text())[run.start :]
    found = json.loads(json.dumps(run.train()))
    for one, other in zip(found, expected, strict=True):
        # As text: a NaN is not equal to itself.
        assert json.dumps(one) == json.dumps(other), f"{case.name}, {root}:\n{one}\n{other}"
    end = load_file(directory / f"end-{rank}.safetensors")
    state = run.state()
    assert state.keys() == end.keys()
    for name, value in state.items():
        assert torch.equal(value.view(-1).view(torch.uint8), end[name].view(-1).view(torch.uint8)), (
            f"{case.name}: {name}"
        )


def main() -> None:
    rank, world, port_file, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    cases = [Case(**fields | {"save_at": tuple(fields["save_at"])}) for fields in json.loads(sys.argv[5])]
    torch.set_num_threads(1)
    join(rank, world, port_file)
    if sys.argv[6] == "again":
        again(cases, rank, world, out)
    else:
        first(cases, sys.argv[6], rank, world, out)
    leave()


if __name__ == "__main__":
    main()
