import math

import pytest
import torch

from kdscale.config.schedule import Schedule
from kdscale.config.sections import LossSection
from kdscale.errors import ConfigError
from kdscale.losses import sparse
from kdscale.losses.divergence import Divergence, divergence
from kdscale.losses.objective import Objective, objective_at
from kdscale.spec import DIVERGENCES as NAMES

P = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
Q = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
# By hand: sum p log(p/q) = .5 ln 2 - .25 ln 2; sum q log(q/p) = .25 (-ln 2 + 0 + ln 2 + ln 2); with M = (6, 4, 3, 3)/16
# both halves of the jsd are .5 ln(4/3) - .25 ln(3/2). Skewed by 0.1: the mixture is .1 p + .9 q = (.275, .25, .2375, .2375),
# or .1 q + .9 p = (.475, .25, .1375, .1375). Forward and reverse KL are equal, so their adaptive mean is too. Centred, the
# teacher's logits are (1.25, .25, -.75, -.75) ln 2 and the student's are 0.
PINNED = {
    "forward_kl": 0.25 * math.log(2),
    "reverse_kl": 0.25 * math.log(2),
    "jsd": 0.5 * math.log(4 / 3) - 0.25 * math.log(3 / 2),
    "skew_forward_kl": 0.5 * math.log(0.5 / 0.275) + 0.25 * math.log(0.125 / 0.2375),
    "skew_reverse_kl": 0.25 * math.log(0.25 / 0.475) + 0.5 * math.log(0.25 / 0.1375),
    "adaptive_kl": 0.25 * math.log(2),
    "tvd": 0.25,
    "logit_mse": (1.25**2 + 0.25**2 + 2 * 0.75**2) * math.log(2) ** 2 / 4,
}


@pytest.mark.parametrize("name", NAMES)
def test_pinned_values(name: str):
    """A change that moves these changes the objective."""
    assert float(divergence(name, Q.log(), P.log())) == pytest.approx(PINNED[name], rel=1e-9)


def test_pinned_topk_value():
    """One kept entry, the rest in one bucket: both sides are (1/2, 1/2) and (1/4, 3/4)."""
    value = sparse.divergence(
        "forward_kl", Q.log(), torch.tensor([[0]]), P[:, :1].log(), torch.tensor([math.log(0.5)], dtype=torch.float64)
    )
    assert float(value) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_distributions_differ_by_nothing(name: str, dtype: torch.dtype):
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    student = logits.clone().requires_grad_()
    value = divergence(name, student, logits)
    value.sum().backward()
    assert value.abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_phantom_ids_stay_out(name: str):
    """-inf on both sides: same value as without the ids, gradient 0 there and finite everywhere."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    padding = torch.full((4, 3), -torch.inf, dtype=torch.float64)
    padded = torch.cat([student, padding], 1).requires_grad_()
    value = divergence(name, padded, torch.cat([teacher, padding], 1))
    torch.testing.assert_close(value, divergence(name, student, teacher))
    value.sum().backward()
    assert torch.isfinite(padded.grad).all()
    assert (padded.grad[:, 10:] == 0).all()


def test_unknown_names_and_bounds_are_refused():
    with pytest.raises(ConfigError, match="'l2' is unknown; choose one of forward_kl"):
        divergence("l2", Q, P)
    with pytest.raises(ConfigError, match="beta = 1"):
        divergence("jsd", Q, P, beta=1.0)


def test_what_topk_does_not_carry_is_refused():
    with pytest.raises(ConfigError, match=r"'logit_mse' cannot be had from top-k targets; choose one of forward_kl"):
        sparse.divergence("logit_mse", Q, torch.tensor([[0]]), P[:, :1], P[:, 0])


def test_schedules_move_the_objective():
    loss = LossSection(
        temperature=Schedule(start=1, end=3),
        hard_weight=Schedule(shape="cosine", start=0, end=1),
        skew=Schedule(start=0.1, end=0.5),
    )
    first, middle, last = (objective_at(loss, step, 101) for step in (0, 50, 100))
    assert [one.temperature for one in (first, middle, last)] == [1, 2, 3]
    assert [one.hard_weight for one in (first, middle, last)] == pytest.approx([0, 0.5, 1])
    assert middle.divergence.skew == pytest.approx(0.3)
    assert objective_at(loss, 25, 101).hard_weight == pytest.approx(0.5 * (1 - math.cos(math.pi / 4)))


@pytest.mark.parametrize("name", NAMES)
def test_soft_gradient_keeps_its_size_over_temperature(name: str):
    """s(tau) makes up for the softened gradient: from tau = 1 to 8 its norm moves by less than a factor of 1.6."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    norms = {}
    for temperature in (1.0, 2.0, 4.0, 8.0):
        leaf = student.clone().requires_grad_()
        factor = Objective(Divergence(name), temperature).soft_factor
        (factor * divergence(name, leaf, teacher, temperature=temperature)).sum().backward()
        norms[temperature] = float(leaf.grad.norm())
    assert max(norms.values()) / min(norms.values()) < 1.6
