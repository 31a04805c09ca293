import numpy as np
import pytest
import torch

from kdscale.batch import DenseTargets, HiddenTargets, SampledTargets, SoftTargets
from kdscale.head import Head, HeadSpec
from kdscale.losses import divergence as dense_losses
from kdscale.losses import sparse
from kdscale.losses.divergence import Divergence
from kdscale.losses.fused import STATS, fused_loss
from kdscale.losses.objective import Objective
from kdscale.spec import DIVERGENCES, SEPARABLE
from tests.parity import numpy_losses as reference
from tests.targets import topk_of_logits

T, V, K, D = 7, 23, 5, 6
SHAPE = {"beta": 0.3, "skew": 0.2}
SOFTCAP, SCALE = 4.0, 0.7


def logits(seed: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(T, V)) * scale


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_dense_value_and_gradient(name: str, temperature: float):
    student, teacher = logits(1), logits(2)
    ours = torch.from_numpy(student).requires_grad_()
    value = dense_losses.divergence(
        name, ours, torch.from_numpy(teacher), temperature=temperature, head_mass=0.6, **SHAPE
    )
    expected = reference.dense(name, student, teacher, temperature, **SHAPE)
    np.testing.assert_allclose(value.detach(), expected, rtol=1e-12)
    value.sum().backward()

    def moved(u: np.ndarray) -> float:
        return float(reference.dense(name, u, teacher, temperature, frozen=student, **SHAPE).sum())

    np.testing.assert_allclose(ours.grad, reference.gradient(moved, student), atol=1e-8)


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_topk_value_and_gradient(name: str, temperature: float):
    student, teacher = logits(1), logits(2)
    targets = topk_of_logits(torch.from_numpy(teacher), K, temperature)
    ours = torch.from_numpy(student).requires_grad_()
    value = sparse.divergence(
        name, ours, targets.ids_TK, targets.logp_TK, targets.tail_logp_T, temperature=temperature, **SHAPE
    )
    ids = targets.ids_TK.numpy().astype(np.int64)
    expected = reference.topk(name, student, teacher, ids, temperature, **SHAPE)
    np.testing.assert_allclose(value.detach(), expected, rtol=1e-10)
    value.sum().backward()
    moved = reference.gradient(lambda u: reference.topk(name, u, teacher, ids, temperature, **SHAPE).sum(), student)
    np.testing.assert_allclose(ours.grad, moved, atol=1e-8)


class Case:
    """A student's head with everything a head can have, and a teacher's of another width."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.arrays = [rng.normal(size=(T, D)), rng.normal(size=(V + 4, D)), rng.normal(size=V + 4)]
        self.labels = rng.integers(0, V, T)
        hidden = torch.from_numpy(rng.normal(size=(T, D + 3))).bfloat16()
        weight, bias = (torch.from_numpy(rng.normal(size=size)).float() for size in ((V, D + 3), (V,)))
        self.teacher_head = Head(weight, bias, HeadSpec(V, softcap=6.0, scale=1.2))
        self.teacher_hidden = hidden
        self.teacher = self.teacher_head.logits(hidden).double()

    def student(self, hidden: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        raw = (hidden @ weight[:V].T + bias[:V]) * SCALE
        return SOFTCAP * np.tanh(raw / SOFTCAP)

    def fused(self, targets: SoftTargets | None, objective: Objective) -> tuple[float, list, dict[str, float]]:
        leaves = [torch.from_numpy(array).float().requires_grad_() for array in self.arrays]
        loss, stats = fused_loss(
            *leaves,
            HeadSpec(V, softcap=SOFTCAP, scale=SCALE),
            torch.from_numpy(self.labels).int(),
            targets,
            objective,
            chunk_bytes=2 * 4 * V,
            teacher_head=self.teacher_head,
        )
        (loss * 0.5).backward()
        assert (leaves[1].grad[V:] == 0).all()
        grads = [leaf.grad.numpy() for leaf in leaves]
        return loss.item(), grads, dict(zip(STATS, stats.tolist(), strict=True))

    def check(self, soft, objective: Objective, found: tuple[float, list, dict[str, float]]) -> None:
        """``soft(student logits)``: the divergence's sum, in NumPy."""
        weight = objective.hard_weight
        factor = reference.factor(objective.divergence.name, objective.temperature)

        def total(*arrays: np.ndarray) -> float:
            student = self.student(*arrays)
            hard = reference.cross_entropy(student, self.labels).sum()
            return (1 - weight) * factor * soft(student) + weight * hard

        loss, grads, stats = found
        assert loss == pytest.approx(total(*self.arrays), rel=5e-6)
        for index, grad in enumerate(grads):

            def moved(at: np.ndarray, index: int = index) -> float:
                return total(*[at if other == index else self.arrays[other] for other in range(3)])

            expected = 0.5 * reference.gradient(moved, self.arrays[index])
            np.testing.assert_allclose(grad, expected, atol=3e-5 * np.abs(expected).max())
        student = self.student(*self.arrays)
        assert stats["count"] == T
        assert stats["hard"] == pytest.approx(reference.cross_entropy(student, self.labels).sum(), rel=1e-5)
        assert stats["top1_agree"] == (student.argmax(-1) == self.teacher.numpy().argmax(-1)).sum()
        p = reference.softmax(self.teacher.numpy() / objective.temperature)
        assert stats["teacher_entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-4)


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_fused_topk(name: str, temperature: float, hard_weight: float):
    """Through softcap, scale, bias and a padded vocabulary, to hidden states, weight and bias."""
    case, objective = Case(), Objective(Divergence(name, **SHAPE), temperature, hard_weight)
    targets = topk_of_logits(case.teacher, K, temperature, torch.float32)
    ids, teacher = targets.ids_TK.numpy().astype(np.int64), case.teacher.numpy()
    found = case.fused(targets, objective)
    case.check(
        lambda student: reference.topk(name, student, teacher, ids, temperature, **SHAPE).sum(), objective, found
    )
    student = case.student(*case.arrays)
    kept_q = reference.bucket(reference.softmax(student / temperature), ids)[:, :-1].sum()
    assert found[2]["student_kept_mass"] == pytest.approx(kept_q, rel=1e-5)
    at_one = reference.topk("forward_kl", student, teacher, ids, 1.0).sum()
    assert found[2]["kl"] == pytest.approx(at_one, rel=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("payload", ["hidden", "dense"])
def test_fused_whole_vocabulary(name: str, temperature: float, payload: str):
    case, objective = Case(), Objective(Divergence(name, **SHAPE, head_mass=0.6), temperature, 0.3)
    labels, teacher = torch.from_numpy(case.labels).int(), case.teacher.numpy()
    logp = torch.log_softmax(case.teacher / temperature, -1).float()
    hidden = HiddenTargets(labels, case.teacher_hidden)
    targets = hidden if payload == "hidden" else DenseTargets(labels, logp, temperature)
    frozen = case.student(*case.arrays)
    found = case.fused(targets, objective)
    case.check(
        lambda student: reference.dense(name, student, teacher, temperature, frozen=frozen, **SHAPE).sum(),
        objective,
        found,
    )
    assert found[2]["kl"] == pytest.approx(reference.dense("forward_kl", frozen, teacher, 1.0).sum(), rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_fused_sampled(temperature: float):
    """The estimate is a weighted cross-entropy over whatever was drawn, less the teacher's entropy."""
    case, objective = Case(), Objective(Divergence("forward_kl"), temperature, 0.3)
    rng = np.random.default_rng(1)
    ids, weights = rng.integers(0, V, (T, K)), rng.dirichlet(np.ones(K), T)
    weights[:, -1] = 0
    ids[:, 0] = case.teacher.argmax(-1)
    weights[:, 0] += 1
    p = reference.softmax(case.teacher.numpy() / temperature)
    entropy = -(p * np.log(p)).sum(-1)
    tensors = (
        torch.from_numpy(array)
        for array in (weights.astype("f4"), np.full(T, K, "i4"), np.zeros(T, "i4"), entropy.astype("f4"))
    )
    targets = SampledTargets(torch.from_numpy(case.labels).int(), torch.from_numpy(ids).int(), *tensors, temperature)

    def soft(student: np.ndarray) -> float:
        logq = np.log(reference.softmax(student / temperature))
        return float(-(weights * np.take_along_axis(logq, ids, -1)).sum() - entropy.sum())

    case.check(soft, objective, case.fused(targets, objective))
