"""A student goes on on other ranks, under another ZeRO stage, pipeline or dtype, from what the processes before it saved.

Each leg restores where the one before it saved, compares every number with what that one had, trains on, and saves. The
numbers are compared by DeepSpeed's own means, parameter by parameter.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import load_file, save_file

from kdscale.engine.partition import MOMENTS
from tests.distributed.launch import join, leave
from tests.distributed.tiny_run import Case, TinyRun


def by_parameter(run: TinyRun, rank: int) -> dict[str, torch.Tensor]:
    """Master weights, moments and model weights on rank 0, whole and by the student's names; every rank calls it.

    In a pipeline the model's weights alone: DeepSpeed's means need every rank to hold a part of every parameter.
    """
    weights = {f"{name}.model": value.float() for name, value in run.student.whole_state().items()}
    if run.case.pipeline > 1:
        return weights
    states, found = run.student.engine.basic_optimizer.state, {}
    for name, parameter in run.student.partition.trained.items():
        slots = [one.slot for one in run.student.partition.by_name(name)]
        if run.case.stage == 0:
            # Here DeepSpeed has no such means, and nothing is sharded.
            slot = run.student.partition.slots[slots[0]]
            found[f"{name}.master"] = slot
            found |= {f"{name}.{moment}": states[slot][moment] for moment in MOMENTS}
        else:
            found[f"{name}.master"] = safe_get_full_fp32_param(parameter)
            found |= {f"{name}.{moment}": safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
    found = {name: value.detach().float().cpu().clone() for name, value in found.items()}
    steps = {float(states[slot]["step"]) for slot in run.student.partition.slots}
    return weights | found | {"step": torch.tensor(sorted(steps))} if rank == 0 else {}


def link(run: TinyRun) -> None:
    """DeepSpeed links states to parameters in its first step; a restored student is looked at before that."""
    linked = getattr(run.student.engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if linked is not None:
        linked()


def leg(case: Case, way: str, number: int, rank: int, world: int, out: Path) -> None:
    run = TinyRun(case, rank, world, seed=number)
    if number:
        assert run.resume(out / f"leg-{number - 1}") == way, f"{out.name}, leg {number}"
        link(run)
        # What this run says, not what DeepSpeed has restored.
        assert {group["weight_decay"] for group in run.student.engine.optimizer.param_groups} == {case.weight_decay}
        assert getattr(run.student.engine.optimizer, "clip_grad", case.clip) == case.clip, f"{out.name}, leg {number}"
        state = by_parameter(run, rank)
        if rank == 0:
            compare(state, load_file(out / f"state-{number - 1}.safetensors"), case, f"{out.name}, leg {number}")
    steps = run.train(out / f"leg-{number}")
    state = by_parameter(run, rank)
    if rank == 0:
        save_file(state, out / f"state-{number}.safetensors")
    rows: list[Any] = [None] * world
    dist.all_gather_object(rows, run.rows)
    if rank == 0:
        (out / f"leg-{number}.json").write_text(json.dumps({"steps": steps, "rows": rows}))


def compare(found: dict[str, torch.Tensor], before: dict[str, torch.Tensor], case: Case, where: str) -> None:
    common = found.keys() & before.keys()
    assert {name for name in found if name.endswith(".model")} <= common
    for name in common:
        value, other = found[name], before[name]
        master = name.removesuffix(".model") + ".master"
        if name.endswith(".model"):
            # What the model computes with is its master rounded to its dtype.
            other = before.get(master, found.get(master, other)).to(getattr(torch, case.dtype)).float()
        assert torch.equal(value, other), f"{where}: {name}"


def main() -> None:
    rank, world, port_file, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    join(rank, world, port_file)
    for chain, number, way, fields in json.loads(sys.argv[5]):
        (out / chain).mkdir(exist_ok=True)
        leg(Case(**fields | {"save_at": ()}), way, number, rank, world, out / chain)
    leave()


if __name__ == "__main__":
    main()
