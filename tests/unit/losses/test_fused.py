import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kdscale.batch import HiddenTargets
from kdscale.errors import ConfigError
from kdscale.head import Head, HeadSpec
from kdscale.losses.divergence import Divergence
from kdscale.losses.fused import STATS, fused_loss
from kdscale.losses.objective import Objective
from kdscale.spec import TargetSpec
from kdscale.targets.payloads import make_targets

T, V, D, K = 40, 500, 16, 8
OBJECTIVE = Objective(Divergence("forward_kl"), hard_weight=0.2)


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*size, generator=generator) for size in ((T, D), (V, D)))
    labels = torch.randint(0, V, (T,), generator=generator).int()
    teacher = Head(weight + 0.1 * torch.randn(V, D, generator=generator), None, HeadSpec(V))
    return hidden, weight, labels, make_targets(hidden, teacher, labels, TargetSpec("topk", k=K))


def run(case, *, chunk_rows: int = 7, dtype: torch.dtype = torch.float32, objective: Objective = OBJECTIVE):
    hidden, weight, labels, targets = case
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    loss, stats = fused_loss(
        hidden, weight, None, HeadSpec(V), labels, targets, objective, chunk_bytes=4 * V * chunk_rows
    )
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad, stats


def test_chunk_size_changes_nothing(case):
    whole = run(case, chunk_rows=T)
    for rows in (1, 7, 39):
        for ours, expected in zip(run(case, chunk_rows=rows), whole, strict=True):
            assert (ours - expected).norm() <= 1e-6 * expected.norm()


def test_bfloat16_is_near(case):
    """Against float32 on the same rounded inputs: what is left is the products' own rounding."""
    hidden, weight, labels, targets = case
    hidden = 0.3 * hidden  # logits about 1: their rounding is what bfloat16 products cost
    rounded = (hidden.bfloat16().float(), weight.bfloat16().float(), labels, targets)
    for ours, expected in zip(
        run((hidden, weight, labels, targets), dtype=torch.bfloat16)[:3], run(rounded)[:3], strict=True
    ):
        assert (ours.float() - expected).norm() <= 1e-2 * expected.norm()


def test_no_array_of_all_positions_and_the_vocabulary(case):
    """The largest tensor in either direction is a chunk or a weight, never [T, V]."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in tree_iter(result):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    with Largest() as largest:
        run(case, chunk_rows=4)
    assert 4 * V <= largest.numel <= max(4 * V, V * D) < T * V


def test_no_position_still_gives_a_graph(case):
    hidden, weight, labels, _ = case
    hidden, weight = hidden[:0].requires_grad_(), weight.clone().requires_grad_()
    loss, stats = fused_loss(hidden, weight, None, HeadSpec(V), labels[:0], None, OBJECTIVE, chunk_bytes=1000)
    loss.backward()
    assert float(loss.detach()) == 0
    assert stats.tolist() == [0.0] * len(STATS)
    assert (weight.grad == 0).all()
    assert hidden.grad.shape == (0, D)


def test_frozen_head_gets_no_gradient(case):
    hidden, weight, labels, targets = case
    leaf = hidden.clone().requires_grad_()
    loss, _ = fused_loss(leaf, weight, None, HeadSpec(V), labels, targets, OBJECTIVE, chunk_bytes=4 * V * 7)
    loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(leaf.grad, run(case)[1])


def test_labels_only_is_cross_entropy(case):
    hidden, weight, labels, _ = case
    loss, _ = fused_loss(hidden, weight, None, HeadSpec(V), labels, None, OBJECTIVE, chunk_bytes=4 * V * 7)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, labels.long(), reduction="sum")
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_a_shift_by_one_is_seen(case):
    """The same targets one position later give another loss: alignment matters and is not averaged away."""
    hidden, weight, labels, targets = case
    shifted = (torch.roll(hidden, 1, 0), weight, labels, targets)
    assert abs(float(run(shifted)[0]) - float(run(case)[0])) > 0.1 * float(run(case)[0])


def test_statistics(case):
    _, _, _, stats = run(case)
    figures = dict(zip(STATS, stats.tolist(), strict=True))
    targets = case[3]
    assert figures["count"] == T
    assert figures["teacher_entropy"] == pytest.approx(float(targets.entropy_T.sum()), rel=1e-5)
    assert figures["teacher_kept_mass"] == pytest.approx(float(targets.logp_TK.exp().sum()), rel=1e-5)
    logits = case[0] @ case[1].T
    assert figures["top1_agree"] == int((logits.argmax(-1) == targets.ids_TK[:, 0]).sum())


def test_hidden_targets_need_the_teachers_head(case):
    hidden, weight, labels, _ = case
    targets = HiddenTargets(labels, hidden.bfloat16())
    for head, held in ((None, "no teacher head"), (Head(weight[:7], None, HeadSpec(7)), "a teacher head of 7 tokens")):
        with pytest.raises(ConfigError, match=held):
            fused_loss(
                hidden, weight, None, HeadSpec(V), labels, targets, OBJECTIVE, chunk_bytes=4 * V, teacher_head=head
            )
