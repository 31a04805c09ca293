"""Going on with other ranks, another ZeRO stage, pipeline or dtype: the same rows, the same numbers, the same losses."""

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import elastic_ranks
from tests.distributed.launch import run_ranks
from tests.distributed.tiny_run import Case, make_rows

SAVED, LEG, LAST = 3, 20, 4
STEPS = SAVED + LEG + LAST
WORLDS = (2, 1, 2)
"""Ranks of the processes that follow one another."""


def legs(*cases: tuple[int, dict[str, Any]], **common: Any) -> list[tuple[int, Case]]:
    """(which processes, case): the first trains ``SAVED`` steps, the second ``LEG``, the third ``LAST``."""
    untils = (SAVED, SAVED + LEG, 0)
    return [
        (group, Case(**{"steps": STEPS, "until": until} | common | fields))
        for (group, fields), until in zip(cases, untils, strict=True)
    ]


# A pipeline's chains come last: DeepSpeed goes on looking for the stages of a process that once had some.
CHAINS: dict[str, list[tuple[int, Case]]] = {
    "through": [(0, Case(stage=1, steps=STEPS))],
    "ranks under ZeRO-3": legs((0, {"stage": 3}), (1, {"stage": 3}), (2, {"stage": 3})),
    "ranks without ZeRO": legs((0, {"stage": 0}), (1, {"stage": 2}), (2, {"stage": 0})),
    "stages": legs((0, {"stage": 3}), (0, {"stage": 1}), (0, {"stage": 3})),
    "more stages": legs((0, {"stage": 0}), (0, {"stage": 2}), (0, {"stage": 0})),
    "through frozen": [(0, Case(stage=1, steps=STEPS, frozen="embed_tokens"))],
    "frozen": legs((0, {"stage": 1}), (1, {"stage": 2}), (2, {"stage": 3}), frozen="embed_tokens"),
    "through bfloat16": [(0, Case(stage=1, steps=STEPS, dtype="bfloat16"))],
    "bfloat16": legs((0, {"stage": 3}), (1, {"stage": 0}), (2, {"stage": 1}), dtype="bfloat16"),
    "to bfloat16": legs((0, {"stage": 1}), (1, {"stage": 2, "dtype": "bfloat16"}), (2, {"stage": 1})),
    "pipeline": legs((0, {"stage": 1, "pipeline": 2}), (1, {"stage": 3}), (2, {"stage": 1, "pipeline": 2})),
    "bfloat16 pipeline": legs(
        (0, {"stage": 1, "pipeline": 2}), (1, {"stage": 3}), (2, {"stage": 1, "pipeline": 2}), dtype="bfloat16"
    ),
}


@pytest.mark.slow
def test_other_ranks_go_on_with_the_same_numbers(tmp_path: Path):
    for group, world in enumerate(WORLDS):
        todo = [
            (name, number, "converted", asdict(case))
            for name, chain in CHAINS.items()
            for number, (where, case) in enumerate(chain)
            if where == group
        ]
        run_ranks(elastic_ranks.__name__, world, str(tmp_path), json.dumps(todo), timeout_s=400)

    losses: dict[str, list[float]] = {name: [] for name in CHAINS}
    for name, chain in CHAINS.items():
        step = 0
        for number in range(len(chain)):
            found = json.loads((tmp_path / name / f"leg-{number}.json").read_text())
            assert_same_rows(found["rows"], step, chain[number][1])
            losses[name] += [one["loss"] for one in found["steps"]]
            step += len(found["steps"])
        assert step == STEPS, name
    for name, chain in CHAINS.items():
        rounded = any(case.dtype == "bfloat16" for _, case in chain)
        control = "through"
        if chain[0][1].frozen:
            control += " frozen"
        elif chain[0][1].dtype == "bfloat16":
            control += " bfloat16"
        for step, (one, other) in enumerate(zip(losses[name], losses[control], strict=True), start=1):
            assert one == pytest.approx(other, rel=5e-3 if rounded else 1e-6), f"{name}, step {step}"


def assert_same_rows(rows: list[list[list[int]]], first: int, case: Case) -> None:
    """The data ranks' shares, one after the other, are the batch; every stage of a pipeline sees its replica's share."""
    data = len(rows) // case.pipeline
    loader = make_rows(case.config(len(rows)).run.seed)
    for number in range(len(rows[0])):
        expected = loader.batch(first + number).ids_RL.sum(1).tolist()
        for stage in range(case.pipeline):
            shares = rows[stage * data : (stage + 1) * data]
            assert [row for share in shares for row in share[number]] == expected


@pytest.mark.slow
def test_settings_that_may_change_hold_where_the_ranks_are_the_same(tmp_path: Path):
    """DeepSpeed restores those of the run before with the optimizer's states."""
    changed = {"clip": 0.25, "weight_decay": 0.0}
    cases = {
        f"{dtype} {stage}": (Case(stage=stage, dtype=dtype, until=SAVED), Case(stage=stage, dtype=dtype, **changed))
        for dtype, stage in product(("float32", "bfloat16"), (0, 1, 3))
    }
    todo = [(name, number, "exact", asdict(case)) for name, legs in cases.items() for number, case in enumerate(legs)]
    run_ranks(elastic_ranks.__name__, 1, str(tmp_path), json.dumps(todo), timeout_s=400)
    for name in cases:
        assert len(json.loads((tmp_path / name / "leg-1.json").read_text())["steps"]) == Case().steps - SAVED
