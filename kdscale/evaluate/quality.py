"""How near a student is to its teacher on held-out text: pure functions over (batches, scorer, source).

Exact over the full vocabulary: the teacher's hidden states come over the stream, its head is held beside.
T = positions, V = true vocabulary, D = hidden size.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch

from kdscale.batch import HiddenTargets, TargetSpec, TokenBatch
from kdscale.head import Head, chunk_rows
from kdscale.stream.prefetch import Prefetcher
from kdscale.stream.source import TargetSource

CHUNK_BYTES = 64 << 20
HIDDEN = TargetSpec(payload="hidden")
Scorer = Callable[[TokenBatch], torch.Tensor]
"""A batch's final hidden states at its trained positions, [T, D]."""


@dataclass(frozen=True)
class Quality:
    """Means over held-out tokens, at temperature 1; KL(teacher ‖ student) in nats."""

    num_tokens: int
    kl: float
    top1_agreement: float
    perplexity_student: float
    perplexity_teacher: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class TeacherView:
    """The teacher's side of the held-out text, fetched once and used before and after."""

    batches: list[TokenBatch]
    hidden: list[torch.Tensor]
    head: Head


def teacher_view(
    batches: list[TokenBatch], source: TargetSource, fetch_head: Callable[[], Head], in_flight: int
) -> TeacherView:
    """Ask the served teacher for its hidden states on ``batches`` and for its head, all at once.

    Raises:
        StreamError, IdentityError: what the source raises.
    """
    with ThreadPoolExecutor(1) as beside:
        head = beside.submit(fetch_head)
        prefetcher = Prefetcher(source, HIDDEN, iter(batches), in_flight)
        try:
            targets = [prefetcher.next().targets for _ in batches]
        finally:
            prefetcher.close()
        hidden = [one.hidden_TD for one in targets if isinstance(one, HiddenTargets)]
        return TeacherView(batches, hidden, head.result())


@torch.no_grad()
def quality_sums(student_hidden: list[torch.Tensor], student_head: Head, view: TeacherView) -> torch.Tensor:
    """float64 sums [KL, agreements, student's and teacher's negative log-likelihood, tokens], to be added over ranks."""
    sums = torch.zeros(5, dtype=torch.float64)
    rows = chunk_rows(view.head.spec.vocab_size, CHUNK_BYTES)
    for batch, ours, theirs in zip(view.batches, student_hidden, view.hidden, strict=True):
        labels = torch.from_numpy(batch.labels()).long()
        for start in range(0, len(labels), rows):
            part = slice(start, start + rows)
            student = torch.log_softmax(student_head.logits(ours[part]), -1).cpu()
            teacher = torch.log_softmax(view.head.logits(theirs[part]), -1)
            label = labels[part].unsqueeze(1)
            sums[0] += (teacher.exp() * (teacher - student)).sum().double()
            sums[1] += (teacher.argmax(-1) == student.argmax(-1)).sum().double()
            sums[2] -= student.gather(1, label).sum().double()
            sums[3] -= teacher.gather(1, label).sum().double()
            sums[4] += len(label)
    return sums


def quality(sums: torch.Tensor) -> Quality:
    """The means that sums over all ranks amount to."""
    kl, agree, student_nll, teacher_nll, tokens = sums.tolist()
    return Quality(
        num_tokens=int(tokens),
        kl=kl / tokens,
        top1_agreement=agree / tokens,
        perplexity_student=float(np.exp(student_nll / tokens)),
        perplexity_teacher=float(np.exp(teacher_nll / tokens)),
    )
