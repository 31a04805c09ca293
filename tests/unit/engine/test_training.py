import pytest

from kdscale.config.sections import TrainSection
from kdscale.engine.training import learning_rate


def rates(**fields) -> list[float]:
    train = TrainSection(steps=11, lr=2.0, final_lr_share=0.1, **fields)
    return [learning_rate(step, train) for step in range(11)]


def test_warm_up_is_linear_to_the_peak():
    assert rates(warmup_steps=4, schedule="constant") == pytest.approx([0.5, 1.0, 1.5, 2.0] + [2.0] * 7)


def test_linear_ends_at_the_share():
    assert rates(schedule="linear") == pytest.approx([2.0 - 0.18 * step for step in range(11)])


def test_cosine_is_half_way_in_the_middle():
    found = rates(schedule="cosine")
    assert (found[0], found[5], found[10]) == pytest.approx((2.0, 1.1, 0.2))
    assert found == sorted(found, reverse=True)
