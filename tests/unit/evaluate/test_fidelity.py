import math

import pytest
import torch

from kdscale.batch import DenseTargets
from kdscale.evaluate.fidelity import Positions, distribution_error, exact_gradient, measure
from kdscale.head import Head, HeadSpec
from kdscale.losses.divergence import Divergence
from kdscale.spec import TargetSpec
from kdscale.targets.payloads import make_targets

T, V = 30, 80
FORWARD = Divergence("forward_kl")


@pytest.fixture
def positions() -> Positions:
    generator = torch.Generator().manual_seed(0)

    def head(width: int) -> Head:
        return Head(torch.randn(V, width, generator=generator), None, HeadSpec(V))

    teacher, student = torch.randn(T, 8, generator=generator).bfloat16().float(), torch.randn(T, 6, generator=generator)
    return Positions(torch.zeros(T, dtype=torch.int32), teacher, head(8), student, head(6))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_payloads_that_lose_nothing_have_no_error(positions: Positions, temperature: float):
    exact = exact_gradient(positions, FORWARD, temperature)
    for spec in (
        TargetSpec("hidden", encoding="bfloat16"),
        TargetSpec("dense", temperature=temperature, encoding="float32"),
        TargetSpec("topk", k=V, temperature=temperature),
    ):
        found = measure(positions, spec, exact, FORWARD, temperature=temperature, rounds=1)
        assert found.kl == pytest.approx(0, abs=2e-6), spec
        assert found.noise < 1e-6
        assert found.angle_degrees < 0.1
        assert abs(found.norm_error) < 1e-3


def test_error_is_that_of_the_distribution_the_student_is_pulled_to(positions: Positions):
    """Top-k with its tail spread the way the student spreads it, written out."""
    targets = make_targets(positions.teacher_TD, positions.teacher_head, positions.labels_T, TargetSpec("topk", k=4))
    p = torch.softmax(positions.teacher_head.logits(positions.teacher_TD).double(), -1)
    q = torch.softmax(positions.student_head.logits(positions.student_TD).double(), -1)
    top = p.topk(4)
    rest = torch.ones_like(p).scatter(1, top.indices, 0.0)
    spread = q * rest * ((p * rest).sum(-1) / (q * rest).sum(-1))[:, None]
    estimate = spread.scatter(1, top.indices, top.values)
    kl, noise = distribution_error(positions, targets, 1.0)
    assert kl == pytest.approx(float((p * (p / estimate).log()).sum(-1).mean()), rel=1e-3)
    assert noise == pytest.approx(float((estimate - p).square().sum(-1).mean()), rel=1e-3)


def test_more_bytes_turn_the_gradient_less(positions: Positions):
    exact = exact_gradient(positions, FORWARD, 1.0)
    found = [measure(positions, TargetSpec("topk", k=k), exact, FORWARD, temperature=1.0, rounds=1) for k in (2, 8, 40)]
    assert found[0].angle_degrees > found[1].angle_degrees > found[2].angle_degrees
    assert found[0].bytes_per_token < found[1].bytes_per_token < found[2].bytes_per_token


def test_samples_have_noise_and_no_kl(positions: Positions):
    exact = exact_gradient(positions, FORWARD, 1.0)
    found = measure(positions, TargetSpec("sampled", k=8, encoding="uint8"), exact, FORWARD, temperature=1.0, rounds=1)
    assert math.isinf(found.kl)
    assert found.noise > 0


def test_a_wrong_temperature_shows(positions: Positions):
    """The measure can fail: targets at another temperature turn the gradient."""
    wrong = make_targets(
        positions.teacher_TD,
        positions.teacher_head,
        positions.labels_T,
        TargetSpec("dense", temperature=3.0, encoding="float32"),
    )
    assert isinstance(wrong, DenseTargets)
    kl, _ = distribution_error(positions, DenseTargets(wrong.labels_T, wrong.logp_TV, 1.0), 1.0)
    assert kl > 0.1
