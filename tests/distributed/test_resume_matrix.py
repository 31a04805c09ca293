"""A run killed with SIGKILL and gone on with is the uninterrupted run, bit for bit: losses, parameters, optimizer states.

By default each pair of (ranks, ZeRO stage, dtype, family, place of the save) appears; ``--full-matrix`` runs them all.
"""

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest

from tests.distributed import matrix_ranks
from tests.distributed.launch import run_ranks
from tests.distributed.tiny_run import Case

MID_EPOCH, EPOCH_EDGE, FIRST = 3, 5, 1
KILLS = {1: "in a save", 2: "in a step", 4: "in a save"}


def some(world: int) -> list[Case]:
    """The last case is the one that is killed; data parallel comes first: DeepSpeed goes on looking for the stages of a
    process that once had some."""
    match world:
        case 1:
            return [
                Case(stage=0, family="gpt2", save_at=(EPOCH_EDGE,)),
                Case(stage=0, dtype="bfloat16", micro_rows=4, save_at=(FIRST,)),
                Case(stage=3, frozen="embed_tokens", soft=False),
                Case(stage=1, family="qwen2", micro_rows=2, save_at=(2, MID_EPOCH)),
            ]
        case 2:
            return [
                Case(stage=0, dtype="bfloat16", family="gpt2", micro_rows=2, save_at=(EPOCH_EDGE,)),
                Case(stage=1, family="gpt2", save_at=(FIRST,)),
                Case(stage=2, frozen="embed_tokens", micro_rows=2),
                Case(stage=3, family="gpt2", save_at=(EPOCH_EDGE,)),
                Case(stage=3, dtype="bfloat16", soft=False, save_at=(FIRST,)),
                Case(stage=2, dtype="bfloat16", family="qwen2"),
                Case(stage=0, lora=True),
                Case(stage=1, lora=True, dtype="bfloat16"),
                Case(stage=2, lora=True, family="qwen2", micro_rows=2),
                Case(stage=3, lora=True, dtype="bfloat16", save_at=(EPOCH_EDGE,)),
                Case(stage=0, lora=True, layers=True, dtype="bfloat16"),
                Case(stage=1, lora=True, layers=True, micro_rows=2),
                Case(stage=3, lora=True, layers=True, family="gpt2"),
                Case(stage=0, pipeline=2, family="qwen2", micro_rows=2, clip=0.0, save_at=(EPOCH_EDGE,)),
                Case(stage=1, pipeline=2, family="gpt2", dtype="bfloat16"),
                Case(stage=1, pipeline=2, save_at=(2, MID_EPOCH)),
            ]
        case _:
            return [Case(stage=1, pipeline=2, family="gpt2", save_at=(2, MID_EPOCH))]


def every(world: int) -> list[Case]:
    cuts = [(stage, pipeline) for pipeline in (1, 2) for stage in range(4) if world % pipeline == 0]
    cuts = [(stage, pipeline) for stage, pipeline in cuts if pipeline == 1 or stage < 2]
    cuts = [(stage, pipeline) for stage, pipeline in cuts if world < 4 or pipeline > 1]
    found = []
    for (stage, pipeline), dtype, family, frozen, micro_rows, save_at in product(
        cuts,
        ("float32", "bfloat16"),
        ("llama", "qwen2", "gpt2"),
        (False, True),
        (1, 2),
        ((FIRST,), (MID_EPOCH,), (EPOCH_EDGE,)),
    ):
        if pipeline > 1 and stage == 0 and dtype == "bfloat16":
            continue  # refused at load
        embedding = "wte" if family == "gpt2" else "embed_tokens"
        clip = 0.0 if pipeline > 1 and stage == 0 else 1.0
        frozen_names = embedding if frozen else ""
        found.append(Case(stage, pipeline, dtype, family, micro_rows, frozen_names, save_at=save_at, clip=clip))
    return [*found, some(world)[-1]]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_resumed_is_uninterrupted(world: int, tmp_path: Path, request: pytest.FixtureRequest):
    full = request.config.getoption("--full-matrix")
    cases = (every if full else some)(world)
    fields, limit_s = json.dumps([asdict(case) for case in cases]), 3600 if full else 600
    run_ranks(matrix_ranks.__name__, world, str(tmp_path / "a"), fields, KILLS[world], timeout_s=limit_s, killed=True)
    assert not (tmp_path / "a" / cases[-1].name / "killed" / f"step-{cases[-1].steps}").exists()
    run_ranks(matrix_ranks.__name__, world, str(tmp_path / "a"), fields, "again", timeout_s=limit_s)
