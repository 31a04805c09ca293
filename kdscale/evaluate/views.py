"""The teacher's side of held-out text, whoever teaches: one, each document's own, or a mixture.

T = positions, C = positions of a chunk, V = true vocabulary, D = hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kdscale.batch import Batch, DenseTargets
from kdscale.config.teachers import ALONE
from kdscale.evaluate.quality import CHUNK_BYTES, NO_SUMS, TeacherView, quality_sums, scored, teacher_view
from kdscale.head import Head, chunk_rows
from kdscale.losses.fused import STATS
from kdscale.stream.combining import Mixture, Routed, SeveralTeachers, mixed
from kdscale.stream.source import TeacherSource

TargetSources = TeacherSource | Routed | Mixture


def teachers_of(source: TargetSources) -> Mapping[str, TeacherSource]:
    """The single teachers behind a source, by name."""
    return source.sources if isinstance(source, SeveralTeachers) else {ALONE: source}


@dataclass(frozen=True)
class View:
    """The only teacher's."""

    teacher: TeacherView

    def sums(self, hidden: list[torch.Tensor], head: Head) -> torch.Tensor:
        """``quality_sums`` of a student's hidden states on the batches [T, D], and its head."""
        return quality_sums(hidden, head, self.teacher)


@dataclass(frozen=True)
class RoutedView:
    """Each document's own teacher's."""

    views: list[TeacherView]
    places: list[list[torch.Tensor]]
    """By teacher and batch: which of the batch's positions are its (int64)."""

    def sums(self, hidden: list[torch.Tensor], head: Head) -> torch.Tensor:
        """See ``View``."""
        sums = NO_SUMS.clone()
        for view, places in zip(self.views, self.places, strict=True):
            mine = [one[there.to(one.device)] for one, there in zip(hidden, places, strict=True) if len(there)]
            sums += quality_sums(mine, head, view)
        return sums


@dataclass(frozen=True)
class MixtureView:
    """The mean's of all teachers' distributions by weights."""

    views: list[TeacherView]
    weights: list[float]

    @torch.no_grad()
    def sums(self, hidden: list[torch.Tensor], head: Head) -> torch.Tensor:
        """See ``View``."""
        sums = NO_SUMS.clone()
        rows = chunk_rows(head.spec.vocab_size, CHUNK_BYTES)
        for number, hidden_TD in enumerate(hidden):
            for start in range(0, len(hidden_TD), rows):
                part = slice(start, start + rows)
                mean = self._mean(number, part)
                labels_C = mean.labels_T
                stats = dict(zip(STATS, scored(hidden_TD[part], head, labels_C, mean, None)[1].tolist(), strict=True))
                nll = -mean.logp_TV.gather(1, labels_C.long()[:, None]).double().sum()
                found = [stats["kl"], stats["top1_agree"], stats["hard"], float(nll), stats["count"]]
                sums[: len(found)] += torch.tensor(found, dtype=torch.float64)
        return sums

    def _mean(self, number: int, part: slice) -> DenseTargets:
        """Of some positions of batch ``number``, at temperature 1."""
        each: list[DenseTargets] = []
        for view in self.views:
            theirs = view.targets[number].cut(part)
            logp_CV = torch.log_softmax(view.head.logits(theirs.hidden_TD), dim=-1)
            each.append(DenseTargets(theirs.labels_T, logp_CV, 1.0))
        mean = mixed(list(each), self.weights)
        assert isinstance(mean, DenseTargets)
        return mean


AnyView = View | RoutedView | MixtureView


def view_of(
    batches: list[Batch], source: TargetSources, heads: Mapping[str, Head], in_flight: int, device: torch.device
) -> AnyView:
    """Ask every teacher behind ``source`` for its hidden states on ``batches``; ``heads`` are the teachers'.

    Raises:
        StreamError, IdentityError, CoverageError: what the source raises.
    """
    if isinstance(source, Routed):
        shares = [source.shares(batch) for batch in batches]
        views, places = [], []
        for name, one in source.sources.items():
            mine: list[Batch] = [share[name].batch for share in shares if name in share]
            views.append(teacher_view(mine, one, heads[name], in_flight, device))
            nothing = np.zeros(0, np.int64)
            places.append([torch.from_numpy(share[name].places if name in share else nothing) for share in shares])
        return RoutedView(views, places)
    if isinstance(source, Mixture):
        every = [teacher_view(batches, one, heads[name], in_flight, device) for name, one in source.sources.items()]
        return MixtureView(every, source.weights)
    return View(teacher_view(batches, source, heads[ALONE], in_flight, device))
