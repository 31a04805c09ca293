import numpy as np
import pytest
import torch

from kdscale.batch import TopkTargets
from kdscale.head import HeadSpec
from kdscale.losses import divergence as dense_losses
from kdscale.losses import sparse
from kdscale.losses.fused import STATS, fused_loss
from kdscale.losses.objective import Objective
from tests.parity import numpy_losses as reference

NAMES = ("forward_kl", "reverse_kl", "jsd")
T, V, K, D = 7, 23, 5, 6


def logits(seed: int, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(T, V)) * scale


def topk_targets(teacher: np.ndarray, k: int, temperature: float, dtype=torch.float64) -> TopkTargets:
    logp = torch.log_softmax(torch.from_numpy(teacher) / temperature, -1)
    kept, ids = logp.topk(k)
    rest = logp.exp().scatter(1, ids, 0.0).sum(-1)
    return TopkTargets(
        temperature=temperature,
        labels_T=torch.arange(len(teacher), dtype=torch.int32) % V,
        ids_TK=ids.int(),
        logp_TK=kept.to(dtype),
        tail_logp_T=rest.log().to(dtype),
        entropy_T=-(logp.exp() * logp).sum(-1).to(dtype),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_dense_value_and_gradient(name: str, temperature: float):
    student, teacher = logits(1), logits(2)
    ours = torch.from_numpy(student).requires_grad_()
    value = dense_losses.divergence(name, ours, torch.from_numpy(teacher), temperature=temperature, beta=0.3)
    np.testing.assert_allclose(value.detach(), reference.dense(name, student, teacher, temperature, 0.3), rtol=1e-12)
    value.sum().backward()
    expected = reference.gradient(lambda u: reference.dense(name, u, teacher, temperature, 0.3).sum(), student)
    np.testing.assert_allclose(ours.grad, expected, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_topk_value_and_gradient(name: str, temperature: float):
    student, teacher = logits(1), logits(2)
    targets = topk_targets(teacher, K, temperature)
    ours = torch.from_numpy(student).requires_grad_()
    value = sparse.divergence(
        name, ours, targets.ids_TK, targets.logp_TK, targets.tail_logp_T, temperature=temperature, beta=0.3
    )
    ids = targets.ids_TK.numpy().astype(np.int64)
    np.testing.assert_allclose(
        value.detach(), reference.topk(name, student, teacher, ids, temperature, 0.3), rtol=1e-10
    )
    value.sum().backward()
    expected = reference.gradient(lambda u: reference.topk(name, u, teacher, ids, temperature, 0.3).sum(), student)
    np.testing.assert_allclose(ours.grad, expected, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3])
def test_fused_value_and_gradients(name: str, temperature: float, hard_weight: float):
    """Through softcap, scale, bias and a padded vocabulary, to hidden states, weight and bias."""
    rng = np.random.default_rng(0)
    hidden, weight, bias = rng.normal(size=(T, D)), rng.normal(size=(V + 4, D)), rng.normal(size=V + 4)
    labels = rng.integers(0, V, T)
    teacher = logits(2)
    targets = topk_targets(teacher, K, temperature, torch.float32)
    ids = targets.ids_TK.numpy().astype(np.int64)
    spec, beta, softcap, scale = HeadSpec(V, softcap=4.0, scale=0.7), 0.3, 4.0, 0.7

    def objective(hidden: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> float:
        raw = (hidden @ weight[:V].T + bias[:V]) * scale
        student = softcap * np.tanh(raw / softcap)
        soft = reference.topk(name, student, teacher, ids, temperature, beta).sum()
        hard = reference.cross_entropy(student, labels).sum()
        return (1 - hard_weight) * temperature**2 * soft + hard_weight * hard

    tensors = [torch.from_numpy(array).float().requires_grad_() for array in (hidden, weight, bias)]
    loss, stats = fused_loss(
        *tensors,
        spec,
        torch.from_numpy(labels).int(),
        targets,
        Objective(name, temperature, hard_weight, beta),
        chunk_bytes=2 * 4 * V,
    )
    assert loss.item() == pytest.approx(objective(hidden, weight, bias), rel=2e-6)
    (loss * 0.5).backward()
    arrays = [hidden, weight, bias]
    for index, tensor in enumerate(tensors):

        def moved(at: np.ndarray, index: int = index) -> float:
            return objective(*[at if other == index else arrays[other] for other in range(3)])

        expected = 0.5 * reference.gradient(moved, arrays[index])
        np.testing.assert_allclose(tensor.grad, expected, atol=2e-5 * np.abs(expected).max())
    assert (tensors[1].grad[V:] == 0).all()
    figures = dict(zip(STATS, stats.tolist(), strict=True))
    assert figures["count"] == T
    raw = 4.0 * np.tanh((hidden @ weight[:V].T + bias[:V]) * scale / 4.0)
    assert figures["hard"] == pytest.approx(reference.cross_entropy(raw, labels).sum(), rel=1e-5)
    assert figures["top1_agree"] == (raw.argmax(-1) == teacher.argmax(-1)).sum()
    kept_q = reference.bucket(reference.softmax(raw / temperature), ids)[:, :-1].sum()
    assert figures["student_kept_mass"] == pytest.approx(kept_q, rel=1e-5)
