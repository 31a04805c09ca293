"""How near a student is to its teacher on held-out text or examples: pure functions over (batches, scorer, source).

Exact over the full vocabulary: the teacher's hidden states come over the stream, its head is held beside.
T = positions, V = true vocabulary, D = hidden size.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from kdscale.batch import Batch, ExampleBatch, HiddenTargets, SoftTargets
from kdscale.head import Head
from kdscale.losses.divergence import Divergence
from kdscale.losses.fused import STATS, fused_loss
from kdscale.losses.objective import Objective
from kdscale.paired import PairedBatch
from kdscale.spec import DivergenceName, TargetSpec
from kdscale.stream.prefetch import Prefetcher
from kdscale.stream.source import TargetSource

CHUNK_BYTES = 64 << 20
HIDDEN = TargetSpec(payload="hidden", encoding="bfloat16")
NO_SUMS = torch.zeros(9, dtype=torch.float64)
"""What a rank adds that has measured nothing; see ``quality_sums``."""


@dataclass(frozen=True)
class Quality:
    """Means over held-out positions, at temperature 1; KL(teacher ‖ student) in nats. What needs a teacher is ``None`` where
    there is none."""

    num_tokens: int
    kl: float | None
    top1_agreement: float | None
    perplexity_student: float
    perplexity_teacher: float | None
    accuracy_student: float | None = None
    """Of classifiers: the share of examples whose likeliest class is their label."""
    accuracy_teacher: float | None = None
    bits_per_byte_student: float | None = None
    """Where teacher and student read other tokens: bits that text and documents' ends take, a byte of what each predicts."""
    bits_per_byte_teacher: float | None = None

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass(frozen=True)
class TeacherView:
    """The teacher's side of the held-out text, fetched once and used before and after."""

    batches: list[Batch]
    targets: list[HiddenTargets]
    head: Head
    nll: float
    """Sum of the teacher's negative log-likelihood of the labels, nats."""
    right: int
    """How many labels a classifying teacher finds likeliest."""


@torch.no_grad()
def teacher_view(
    batches: list[Batch], source: TargetSource, head: Head, in_flight: int, device: torch.device
) -> TeacherView:
    """Ask the served teacher for its hidden states on ``batches``; ``head`` is its head. Of a batch in which nothing counts it is
    not asked: no recording holds it.

    Raises:
        StreamError, IdentityError, CoverageError: what the source raises.
    """
    counting = [batch for batch in batches if batch.asked.num_tokens]
    prefetcher = Prefetcher(source, ((batch, HIDDEN) for batch in counting), in_flight)
    try:
        fetched = [prefetcher.next().targets for _ in counting]
    finally:
        prefetcher.close()
    head = head.to(device)
    answers = iter([one.each(lambda tensor: tensor.to(device)) for one in fetched if isinstance(one, HiddenTargets)])
    width = head.weight_VD.shape[1]
    nothing = HiddenTargets(torch.zeros(0, dtype=torch.int32), torch.zeros(0, width, dtype=torch.bfloat16))
    nothing = nothing.each(lambda tensor: tensor.to(device))
    targets = [next(answers) if batch.asked.num_tokens else nothing for batch in batches]
    nll = sum(float(scored(one.hidden_TD, head, one.labels_T, None, None)[0]) for one in targets)
    return TeacherView(batches, targets, head, nll, _right(batches, [one.hidden_TD for one in targets], head))


def _right(batches: list[Batch], hidden: list[torch.Tensor], head: Head) -> int:
    """Examples whose label the head finds likeliest; of tokens, whose logits are many, none is looked at."""
    right = 0
    for batch, hidden_TD in zip(batches, hidden, strict=True):
        if isinstance(batch, ExampleBatch) and len(hidden_TD):
            labels_T = torch.from_numpy(batch.labels()).to(hidden_TD.device)
            right += int((head.logits(hidden_TD).argmax(-1) == labels_T).sum())
    return right


def share_of(batches: list[Batch], rank: int, ranks: int) -> list[Batch]:
    """The batches of one of several ranks; every rank has as many, so that all run the same number of forwards."""
    share = batches[rank::ranks]
    if len(share) < -(-len(batches) // ranks):
        share.append(batches[0].cut(slice(0, 1)).untrained())
    return share


def scored(
    hidden_TD: torch.Tensor,
    head: Head,
    labels_T: torch.Tensor,
    targets: SoftTargets | None,
    teacher: Head | None,
    divergence: DivergenceName = "forward_kl",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``fused_loss`` of a divergence at temperature 1; ``teacher`` is the head that hidden targets need."""
    return fused_loss(
        hidden_TD,
        head.weight_VD,
        head.bias_V,
        head.spec,
        labels_T,
        targets,
        Objective(Divergence(divergence)),
        chunk_bytes=CHUNK_BYTES,
        teacher_head=teacher,
    )


@torch.no_grad()
def quality_sums(student_hidden: list[torch.Tensor], student_head: Head, view: TeacherView) -> torch.Tensor:
    """float64 sums [KL, agreements, student's and teacher's negative log-likelihood, positions, student's and teacher's right
    classes, bytes of text that student and teacher predict], to be added over ranks. Of paired batches, which have no tokens in
    common, KL and agreements are 0."""
    if any(isinstance(batch, PairedBatch) for batch in view.batches):
        sums = label_sums(student_hidden, student_head, view.batches)
        sums[3] = view.nll
        return sums
    sums = NO_SUMS.clone()
    sums[3] = view.nll
    sums[5], sums[6] = _right(view.batches, student_hidden, student_head), view.right
    for hidden_TD, targets in zip(student_hidden, view.targets, strict=True):
        stats = dict(zip(STATS, scored(hidden_TD, student_head, targets.labels_T, targets, view.head)[1], strict=True))
        for index, name in ((0, "kl"), (1, "top1_agree"), (2, "hard"), (4, "count")):
            sums[index] += stats[name].double().cpu()
    return sums


@torch.no_grad()
def divergence_sums(
    student_hidden: list[torch.Tensor], student_head: Head, view: TeacherView, names: Sequence[DivergenceName]
) -> torch.Tensor:
    """float64 sums [each divergence of ``names``, positions], in nats at temperature 1, to be added over ranks."""
    sums = torch.zeros(len(names) + 1, dtype=torch.float64)
    for hidden_TD, targets in zip(student_hidden, view.targets, strict=True):
        for index, name in enumerate(names):
            stats = scored(hidden_TD, student_head, targets.labels_T, targets, view.head, name)[1]
            sums[index] += stats[STATS.index("soft")].double().cpu()
        sums[-1] += len(targets)
    return sums


@torch.no_grad()
def label_sums(hidden: list[torch.Tensor], head: Head, batches: list[Batch]) -> torch.Tensor:
    """``quality_sums`` without a teacher: of a student's hidden states on ``batches`` and its head, what labels tell."""
    sums = NO_SUMS.clone()
    for hidden_TD, batch in zip(hidden, batches, strict=True):
        labels_T = torch.from_numpy(batch.labels()).to(hidden_TD.device)
        sums[2] += scored(hidden_TD, head, labels_T, None, None)[0].double().cpu()
        sums[4] += len(labels_T)
        if isinstance(batch, PairedBatch):
            sums[7] += batch.num_bytes
            sums[8] += batch.teacher_num_bytes
    sums[5] = _right(batches, hidden, head)
    return sums


def quality(sums: torch.Tensor, *, classes: bool, teacher: bool = True) -> Quality:
    """The means that sums over all ranks amount to, with or without those that need a ``teacher``; ``classes``: positions are
    examples."""
    kl, agree, student_nll, teacher_nll, tokens, right, teacher_right, num_bytes, teacher_bytes = sums.tolist()
    if num_bytes:
        return Quality(
            num_tokens=int(tokens),
            kl=None,
            top1_agreement=None,
            perplexity_student=float(np.exp(student_nll / tokens)),
            perplexity_teacher=None,
            bits_per_byte_student=student_nll / np.log(2) / num_bytes,
            bits_per_byte_teacher=teacher_nll / np.log(2) / teacher_bytes if teacher else None,
        )
    return Quality(
        num_tokens=int(tokens),
        kl=kl / tokens if teacher else None,
        top1_agreement=agree / tokens if teacher else None,
        perplexity_student=float(np.exp(student_nll / tokens)),
        perplexity_teacher=float(np.exp(teacher_nll / tokens)) if teacher else None,
        accuracy_student=right / tokens if classes else None,
        accuracy_teacher=teacher_right / tokens if classes and teacher else None,
    )
