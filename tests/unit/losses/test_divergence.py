import math

import pytest
import torch

from kdscale.errors import ConfigError
from kdscale.losses import sparse
from kdscale.losses.divergence import NAMES, divergence
from kdscale.losses.objective import Objective, check_support

P = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
Q = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
# By hand: sum p log(p/q) = .5 ln 2 - .25 ln 2; sum q log(q/p) = .25 (-ln 2 + 0 + ln 2 + ln 2); with M = (6, 4, 3, 3)/16
# both halves of the jsd are .5 ln(4/3) - .25 ln(3/2).
PINNED = {
    "forward_kl": 0.25 * math.log(2),
    "reverse_kl": 0.25 * math.log(2),
    "jsd": 0.5 * math.log(4 / 3) - 0.25 * math.log(3 / 2),
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


def test_support_matrix():
    check_support("topk", "jsd")
    with pytest.raises(ConfigError, match=r"logit_mse cannot be had from targets.payload = topk"):
        check_support("topk", "logit_mse")


@pytest.mark.parametrize("name", NAMES)
def test_soft_gradient_keeps_its_size_over_temperature(name: str):
    """tau^2 makes up for the softened gradient: from tau = 2 to 8 its norm moves by less than half."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    norms = {}
    for temperature in (2.0, 4.0, 8.0):
        leaf = student.clone().requires_grad_()
        factor = Objective(name, temperature, hard_weight=0.0).soft_factor
        (factor * divergence(name, leaf, teacher, temperature=temperature)).sum().backward()
        norms[temperature] = float(leaf.grad.norm())
    assert max(norms.values()) / min(norms.values()) < 1.5
