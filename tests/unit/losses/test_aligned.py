from dataclasses import replace

import numpy as np
import pytest
import torch

from kdscale.batch import DenseTargets, HiddenTargets, SoftTargets
from kdscale.errors import ConfigError
from kdscale.head import Head, HeadSpec
from kdscale.losses import sparse
from kdscale.losses.aligned import AlignedTargets, Alignment, aligned_loss, objective_sums
from kdscale.losses.blocks import STATS
from kdscale.losses.divergence import Divergence, divergence
from kdscale.losses.objective import Objective
from kdscale.losses.spans import SpanPlaces, Vocabularies
from kdscale.paired import Matches
from kdscale.spec import SEPARABLE
from tests.parity import numpy_spans
from tests.targets import topk_of_logits

CPU = torch.device("cpu")
OURS, THEIRS = 11, 14
MATCHES = Matches(np.array([3, 4, 5, 6, 10, 0]), np.array([13, 7, 8, 0, 2, 1]))
PARTNER = dict(zip(MATCHES.teacher_M.tolist(), MATCHES.student_M.tolist(), strict=True))
# (student's places, student's tokens, teacher's places, teacher's tokens): one to one and of both vocabularies; one to two,
# where the student's token has a partner; two to one, where the teacher's has one; two to three; one to one of no token in
# common; two to two, whose second token is of both.
SPANS = [
    ((0, 1), [3], (0, 1), [13]),
    ((2, 3), [4], (1, 3), [5, 6]),
    ((3, 5), [1, 2], (3, 4), [8]),
    ((5, 7), [6, 7], (5, 8), [3, 0, 4]),
    ((7, 8), [9], (8, 9), [12]),
    ((8, 10), [8, 3], (9, 11), [0, 5]),
]
OUR_T, THEIR_T = 11, 12


def tokens(count: int, side: int) -> list[int]:
    found = [1] * count
    for span in SPANS:
        found[slice(*span[2 * side])] = span[2 * side + 1]
    return found


def places(side: int) -> SpanPlaces:
    ends = torch.tensor([span[2 * side] for span in SPANS])
    return SpanPlaces(ends[:, 0], ends[:, 1])


def alignment(method: str = "gold", weight: float = 0.5, matches: Matches = MATCHES, sizes=(OURS, THEIRS)) -> Alignment:
    return Alignment(method, weight, Vocabularies.of(matches, *sizes, CPU))


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.tensor(tokens(OUR_T, 0), dtype=torch.int32)


def targets(soft: SoftTargets) -> AlignedTargets:
    return AlignedTargets(
        replace(soft, labels_T=torch.tensor(tokens(THEIR_T, 1), dtype=torch.int32)), places(0), places(1)
    )


def dense(teacher: torch.Tensor) -> AlignedTargets:
    return targets(DenseTargets(torch.zeros(len(teacher), dtype=torch.int32), torch.log_softmax(teacher, -1), 1.0))


def value(student: torch.Tensor, soft: AlignedTargets, name: str, how: Alignment) -> torch.Tensor:
    """The soft loss alone."""
    return objective_sums(student, LABELS, soft, Objective(Divergence(name, beta=0.3, skew=0.2)), how)[0]


@pytest.mark.parametrize("k", [None, 4, 9, THEIRS])
@pytest.mark.parametrize("name", [*SEPARABLE, "uld"])
def test_values_are_those_of_the_definition(name: str, k: int | None):
    """Whatever a payload names; ``k`` none: everything."""
    student, teacher = logits(1, OUR_T, OURS), logits(2, THEIR_T, THEIRS)
    p, q = (torch.softmax(one, -1).numpy() for one in (teacher, student))
    soft = dense(teacher) if k is None else targets(topk_of_logits(teacher, k))
    kept = None if k is None else [set(row.tolist()) for row in teacher.topk(k).indices]
    expected = 0.0
    for (a, b), ours, (c, d), theirs in SPANS:
        if name == "uld":
            expected += numpy_spans.uld(p[c:d], q[a:b], None if kept is None else kept[c])
        else:
            named = None if kept is None else kept[c:d]
            expected += numpy_spans.gold(p[c:d], q[a:b], theirs, ours, PARTNER, name, 0.5, named)
    how = alignment("uld") if name == "uld" else alignment()
    found = value(student, soft, "forward_kl" if name == "uld" else name, how)
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_pinned_value():
    """By hand: two of the teacher's tokens, one of the student's. p = (1/2, 1/4, 1/4), then 1/2 for the second token; q = (1/2,
    1/2); token 0 is of both. Half of the teacher's first token, 0, is the text's; the student's token 1 is the text. Outcomes:
    text (1/4, 1/2), token 0 (1/4, 1/2), rest (1/2, 0 -> 1e-6)."""
    teacher = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]], dtype=torch.float64).log()
    soft = DenseTargets(torch.tensor([0, 1], dtype=torch.int32), teacher, 1.0)
    both = SpanPlaces(torch.tensor([0]), torch.tensor([1])), SpanPlaces(torch.tensor([0]), torch.tensor([2]))
    how = alignment(weight=0, matches=Matches(np.array([0]), np.array([0])), sizes=(2, 3))
    student, labels = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([1], dtype=torch.int32)
    found = objective_sums(student, labels, AlignedTargets(soft, *both), Objective(Divergence("forward_kl")), how)
    expected = 2 * 0.25 * np.log(0.25 / 0.5) + 0.5 * np.log(0.5 / 1e-6)
    assert float(found[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", SEPARABLE)
def test_one_tokenizer_is_the_ordinary_loss(name: str):
    """Spans of one token and the whole vocabulary matched: the divergence over it, or over what top-k keeps."""
    student, teacher = logits(3, 6, OURS), logits(4, 6, OURS)
    labels = torch.arange(6, dtype=torch.int32)
    one = SpanPlaces(torch.arange(6), torch.arange(6) + 1)
    same = alignment(matches=Matches(np.arange(OURS), np.arange(OURS)), sizes=(OURS, OURS))
    objective = Objective(Divergence(name))
    full = DenseTargets(labels, torch.log_softmax(teacher, -1), 1.0)
    found = objective_sums(student, labels, AlignedTargets(full, one, one), objective, same)[0]
    # The rest, of which there is nothing, counts 1e-6 on both sides.
    assert float(found) == pytest.approx(float(divergence(name, student, teacher).sum()), rel=1e-5)
    kept = replace(topk_of_logits(teacher, 4), labels_T=labels)
    found = objective_sums(student, labels, AlignedTargets(kept, one, one), objective, same)[0]
    expected = sparse.divergence(name, student, kept.ids_TK, kept.logp_TK, kept.tail_logp_T).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", [*SEPARABLE, "uld"])
@pytest.mark.parametrize("k", [None, 5])
def test_gradients_are_those_of_the_values(name: str, k: int | None):
    student, teacher = logits(5, OUR_T, OURS).requires_grad_(), logits(6, THEIR_T, THEIRS)
    soft = dense(teacher) if k is None else targets(topk_of_logits(teacher, k))
    how = alignment("uld") if name == "uld" else alignment()
    kind = "forward_kl" if name == "uld" else name
    torch.autograd.gradcheck(lambda one: value(one, soft, kind, how), (student,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("payload", ["topk", "dense", "hidden"])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_chunks_change_nothing(payload: str, rows: int):
    """Value and gradients, of a head with bias, softcap and phantom rows; a span is never cut."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(OUR_T, 8), torch.randn(OURS + 2, 8), torch.randn(OURS + 2)
    spec, head = HeadSpec(OURS, softcap=5.0), Head(torch.randn(THEIRS, 6), None, HeadSpec(THEIRS))
    states = torch.randn(THEIR_T, 6).bfloat16()
    teacher = head.logits(states)
    soft = {
        "topk": lambda: targets(topk_of_logits(teacher, 5, dtype=torch.float32)),
        "dense": lambda: dense(teacher),
        "hidden": lambda: targets(HiddenTargets(torch.zeros(THEIR_T, dtype=torch.int32), states)),
    }[payload]()
    objective = Objective(Divergence("jsd"), hard_weight=0.25)
    leaves = [one.clone().requires_grad_() for one in (hidden, weight, bias)]
    logits_TV = leaves[0] @ leaves[1][:OURS].T + leaves[2][:OURS]
    sums = objective_sums(5 * torch.tanh(logits_TV / 5), LABELS, soft, objective, alignment(), head)
    sums[0].backward()
    ours = [one.clone().requires_grad_() for one in (hidden, weight, bias)]
    widest = OURS if payload == "topk" else OURS + THEIRS
    loss, stats = aligned_loss(
        *ours, spec, LABELS, soft, objective, alignment(), chunk_bytes=4 * widest * rows, teacher_head=head
    )
    (loss * 3).backward()
    torch.testing.assert_close(loss, sums[0].float())
    torch.testing.assert_close(stats, sums[1:].float(), equal_nan=True)
    for own, other in zip(ours, leaves, strict=True):
        torch.testing.assert_close(own.grad, 3 * other.grad, rtol=1e-4, atol=1e-5)
    assert not ours[1].grad[OURS:].any()


def test_statistics_are_of_spans():
    """One that names all that both know agrees with itself in each of them."""
    logits_TV = logits(3, 6, OURS)
    one = SpanPlaces(torch.arange(0, 6, 2), torch.arange(0, 6, 2) + 1)
    same = alignment(matches=Matches(np.arange(OURS), np.arange(OURS)), sizes=(OURS, OURS))
    labels = torch.arange(6, dtype=torch.int32)
    full = DenseTargets(labels, torch.log_softmax(logits_TV, -1), 1.0)
    sums = objective_sums(logits_TV, labels, AlignedTargets(full, one, one), Objective(Divergence("forward_kl")), same)
    stats = dict(zip(STATS, sums[1:].tolist(), strict=True))
    assert (stats["count"], stats["told"], stats["top1_agree"]) == (6, 3, 3)
    assert stats["teacher_kept_mass"] == pytest.approx(3, rel=1e-4)


def test_statistics_and_a_batch_without_spans():
    student = logits(7, OUR_T, OURS)
    none = AlignedTargets(
        dense(logits(8, THEIR_T, THEIRS)).soft, *(one.each(lambda tensor: tensor[:0]) for one in (places(0), places(1)))
    )
    sums = objective_sums(student, LABELS, none, Objective(Divergence("forward_kl"), hard_weight=0.5), alignment())
    hard = -torch.log_softmax(student, -1).gather(1, LABELS.long()[:, None]).sum()
    stats = dict(zip(STATS, sums[1:].tolist(), strict=True))
    assert stats["count"] == OUR_T
    assert stats["soft"] == stats["teacher_kept_mass"] == stats["told"] == 0
    assert stats["hard"] == pytest.approx(float(hard)) == pytest.approx(2 * float(sums[0]))


def test_hidden_targets_need_the_head():
    states = HiddenTargets(torch.zeros(THEIR_T, dtype=torch.int32), torch.zeros(THEIR_T, 4).bfloat16())
    with pytest.raises(ConfigError, match="need the teacher's head"):
        aligned_loss(
            torch.zeros(OUR_T, 4), torch.zeros(OURS, 4), None, HeadSpec(OURS), LABELS, targets(states),
            Objective(Divergence("forward_kl")), alignment(), chunk_bytes=1 << 20,
        )  # fmt: skip
