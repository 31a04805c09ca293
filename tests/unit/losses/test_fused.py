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
from kdscale.spec import ENCODINGS, SUPPORT, Payload, TargetSpec
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


@pytest.mark.parametrize("chunk_rows", [7, 1])
def test_bfloat16_is_near(case, chunk_rows: int):
    """Against float32 on the same rounded inputs: what is left is the products' own rounding. Over many chunks the weight's
    gradient is summed in float32."""
    hidden, weight, labels, targets = case
    hidden = 0.3 * hidden  # logits about 1: their rounding is what bfloat16 products cost
    rounded = (hidden.bfloat16().float(), weight.bfloat16().float(), labels, targets)
    for ours, expected in zip(
        run((hidden, weight, labels, targets), chunk_rows=chunk_rows, dtype=torch.bfloat16)[:3],
        run(rounded)[:3],
        strict=True,
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


def test_a_narrow_weights_gradient_needs_no_wide_sum():
    """Where chunks within the budget are few enough: over as many as come of the shortest quick ones it would be summed in
    float32, which is twice the gradient."""
    count, vocab, width = 16 * 200, 90, 8
    wide: list[torch.Size] = []

    class Wide(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            wide.extend(one.shape for one in tree_iter(result) if getattr(one, "dtype", None) == torch.float32)
            return result

    hidden, weight = (
        torch.ones(*size, dtype=torch.bfloat16).requires_grad_() for size in ((count, width), (vocab, width))
    )
    for chunk_rows, summed_wide in ((1000, False), (150, True)):
        wide.clear()
        with Wide():
            loss, _ = fused_loss(
                *(hidden, weight, None, HeadSpec(vocab), torch.zeros(count).int(), None, OBJECTIVE),
                chunk_bytes=2 * vocab * chunk_rows,
            )
            loss.backward()
        assert (torch.Size((vocab, width)) in wide) == summed_wide


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("payload", ["topk", "hidden", "dense"])
def test_who_is_the_teacher_has_nothing_to_learn(payload: Payload, dtype: torch.dtype):
    """Value and gradients are 0 by every divergence, also with phantom rows; another student's are not."""
    generator = torch.Generator().manual_seed(0)
    states, rows = (torch.randn(*size, generator=generator).bfloat16().to(dtype) for size in ((T, D), (V + 3, D)))
    labels = torch.zeros(T, dtype=torch.int32)
    head = Head(rows, None, HeadSpec(V))
    spec = TargetSpec(payload, k=K if payload == "topk" else 0, encoding=ENCODINGS[payload][0])
    targets = make_targets(states, head, labels, spec)

    def soft(name: str, of: torch.Tensor) -> tuple[float, float]:
        hidden, weight = of.clone().requires_grad_(), rows.clone().requires_grad_()
        loss, _ = fused_loss(
            *(hidden, weight, None, HeadSpec(V), labels, targets, Objective(Divergence(name))),
            chunk_bytes=4 * V * 7,
            teacher_head=head,
        )
        loss.backward()
        assert not weight.grad[V:].any()
        return float(loss.detach()), float(hidden.grad.float().norm() + weight.grad.float().norm())

    for name in SUPPORT[payload]:
        (value, slope), (other, other_slope) = soft(name, states), soft(name, states.flip(0))
        assert abs(value) < 1e-4 * other, name
        # Total variation has a kink there.
        assert slope < 1e-2 * other_slope or name == "tvd", name


def test_a_narrow_gradient_is_scaled_as_a_wide_one(case):
    """What stands before the loss is not rounded to eight bits, which would tilt the whole gradient."""
    hidden, weight, labels, targets = case
    grads = []
    for factor in (1.0, 1 / 3):
        leaf = hidden.bfloat16().requires_grad_()
        loss, _ = fused_loss(
            *(leaf, weight.bfloat16(), None, HeadSpec(V), labels, targets, OBJECTIVE), chunk_bytes=4 * V * 7
        )
        (loss * factor).backward()
        grads.append(leaf.grad.double())
    assert float((grads[0] * grads[1]).sum() / grads[0].square().sum()) == pytest.approx(1 / 3, rel=2e-4)


def test_statistics(case):
    _, _, _, stats = run(case)
    figures = dict(zip(STATS, stats.tolist(), strict=True))
    targets = case[3]
    assert figures["count"] == figures["told"] == T
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
