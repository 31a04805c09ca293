"""Facts of the divergences over random distributions."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.batch import TopkTargets
from kdscale.head import Head, HeadSpec
from kdscale.losses import sparse
from kdscale.losses.divergence import Divergence, divergence, gradient
from kdscale.losses.fused import fused_loss
from kdscale.losses.objective import Objective
from kdscale.spec import DIVERGENCES, SEPARABLE, TargetSpec
from kdscale.targets.payloads import make_targets

seeds = st.integers(0, 10_000)
names = st.sampled_from(DIVERGENCES)
separable = st.sampled_from(SEPARABLE)


def pair(seed: int, scale: float, tokens: int = 6, vocab: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * scale for _ in range(2))


def kept(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logp = torch.log_softmax(teacher, -1)
    values, ids = logp.topk(k)
    return ids, values, logp.exp().scatter(1, ids, 0.0).sum(-1).log()


@given(names, seeds, st.floats(0.1, 20))
@settings(max_examples=60, deadline=None)
def test_divergences_are_not_negative(name: str, seed: int, scale: float):
    student, teacher = pair(seed, scale)
    assert divergence(name, student, teacher).min() > -1e-12


@given(seeds, st.floats(0.1, 20))
@settings(max_examples=40, deadline=None)
def test_jsd_is_symmetric_and_bounded(seed: int, scale: float):
    student, teacher = pair(seed, scale)
    value = divergence("jsd", student, teacher)
    torch.testing.assert_close(value, divergence("jsd", teacher, student), rtol=1e-9, atol=1e-12)
    assert value.max() <= math.log(2) + 1e-12


@given(separable, seeds, st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_topk_rises_to_the_full_value(name: str, seed: int, scale: float):
    student, teacher = pair(seed, scale)
    vocab = student.shape[1]
    full = divergence(name, student, teacher)
    values = [sparse.divergence(name, student, *kept(teacher, k)) for k in range(1, vocab + 1)]
    for lower, higher in itertools.pairwise(values):
        assert (higher - lower).min() > -1e-9
    for exact in (values[-2], values[-1]):
        torch.testing.assert_close(exact, full, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize("k", [16, 17])
def test_topk_gradient_equals_the_full_one_where_nothing_is_lost(name: str, k: int):
    student, teacher = pair(3, 2.0)
    grads = []
    for value in (lambda u: divergence(name, u, teacher), lambda u: sparse.divergence(name, u, *kept(teacher, k))):
        leaf = student.clone().requires_grad_()
        value(leaf).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-8, atol=1e-10)


@given(separable, seeds, st.sampled_from([1, 3, 16, 17]), st.sampled_from([1.0, 3.0]), st.sampled_from([0.0, 0.4, 1.0]))
@settings(max_examples=60, deadline=None)
def test_fused_equals_plain_autograd(name: str, seed: int, k: int, temperature: float, hard_weight: float):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, teacher_hidden = (torch.randn(*size, generator=generator) for size in ((6, 8), (17, 8), (6, 8)))
    labels = torch.randint(0, 17, (6,), generator=generator)
    head, objective = (
        Head(weight * 1.1, None, HeadSpec(17)),
        Objective(Divergence(name, beta=0.4), temperature, hard_weight),
    )
    targets = make_targets(teacher_hidden, head, labels, TargetSpec("topk", k=k, temperature=temperature))
    results = []
    for fused in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if fused:
            loss, _ = fused_loss(
                leaves[0], leaves[1], None, HeadSpec(17), labels.int(), targets, objective, chunk_bytes=4 * 17 * 4
            )
        else:
            logits = leaves[0] @ leaves[1].T
            soft = sparse.divergence(
                name, logits, targets.ids_TK, targets.logp_TK, targets.tail_logp_T, temperature=temperature, beta=0.4
            ).sum()
            hard = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            loss = objective.soft_factor * soft + hard_weight * hard
        loss.backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).norm() <= 2e-5 * max(1.0, float(plain.norm()))


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize("tail", [0.0, 1e-12, 1 - 1e-6])
@pytest.mark.parametrize("logit", [0.0, 60.0, 100.0, -100.0])
def test_extreme_tails_stay_finite(name: str, tail: float, logit: float):
    """Of the teacher and of the student, who is sure of a kept token, or rules it out."""
    hidden = torch.tensor([[logit, 0.0, 0.0, 0.0]]).requires_grad_()
    weight = torch.eye(20, 4).requires_grad_()
    logp = torch.full((1, 2), math.log(max(1 - tail, 1e-30) / 2))
    targets = TopkTargets(
        torch.zeros(1, dtype=torch.int32),
        torch.tensor([[0, 1]]),
        logp,
        torch.tensor([tail]).log(),
        torch.zeros(1),
        torch.zeros(1),
        1.0,
    )
    loss, _ = fused_loss(
        hidden,
        weight,
        None,
        HeadSpec(20),
        torch.zeros(1),
        targets,
        Objective(Divergence(name)),
        chunk_bytes=1000,
    )
    loss.backward()
    assert -1e-6 <= loss.item() < math.inf
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("skew", [0.0, 1e-3, 0.9])
@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
def test_skewed_gradients_where_the_teacher_rules_out_what_the_student_likes(name: str, skew: float):
    """The closed form is autograd's also at the ends of the skew, over a ratio that float32 cannot hold."""
    student = torch.zeros(1, 5).requires_grad_()
    teacher = torch.tensor([[0.0, -1.0, -2.0, -120.0, -120.0]])
    (expected,) = torch.autograd.grad(divergence(name, student, teacher, skew=skew).sum(), [student])
    logp, logq = (torch.log_softmax(one.detach(), -1) for one in (teacher, student))
    torch.testing.assert_close(gradient(Divergence(name, skew=skew), logp, logq), expected, rtol=1e-5, atol=1e-6)
