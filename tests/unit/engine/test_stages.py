import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kdscale.config import RunConfig
from kdscale.engine.stages import balanced


@given(st.lists(st.floats(1e-5, 1.0), min_size=3, max_size=8), st.integers(2, 3))
def test_the_longest_stage_is_as_short_as_it_can_be(seconds: list[float], stages: int):
    bounds = balanced(seconds, stages)
    assert bounds[0] == 0
    assert bounds[-1] == len(seconds)
    assert bounds == sorted(bounds)

    def longest(cuts: list[int]) -> float:
        return max(sum(seconds[start:stop]) for start, stop in itertools.pairwise(cuts))

    def every(first: int, left: int) -> list[list[int]]:
        if left == 1:
            return [[len(seconds)]]
        return [[cut, *rest] for cut in range(first, len(seconds) + 1) for rest in every(cut, left - 1)]

    best = min(longest([0, *cuts]) for cuts in every(0, stages))
    assert longest(bounds) <= best + 1e-9


@pytest.mark.parametrize(
    ("sections", "rule"),
    [
        ({"run": {"deterministic": True}, "student": {"parallel": {"pipeline": 2, "split": "time"}}}, "times differ"),
        ({"student": {"parallel": {"split": "time"}}}, "one stage"),
    ],
)
def test_where_time_cannot_decide(sections: dict, rule: str):
    fields = {"data": {"train": ["x"]}, "teacher": {"model": "x"}, "deepspeed": {"zero_optimization": {"stage": 1}}}
    student = {"layers": [0], **sections.pop("student")}
    with pytest.raises(ValueError, match=rule):
        RunConfig.model_validate({**fields, **sections, "student": student, "train": {"batch_rows": 8}})
