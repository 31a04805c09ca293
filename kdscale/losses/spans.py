"""What teacher and student say of the same spans of text, brought to the same outcomes.

S = spans, T = positions of one side (those that predict the spans' tokens, in order), V = its vocabulary, K = entries named by a
payload, O = outcomes named on both sides, U = tokens that only one side has.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch

from kdscale.batch import DenseTargets, SoftTargets, TopkTargets
from kdscale.paired import Matches

_LEAST = 1e-6
"""What float32 can tell of what is left of 1."""
_NEVER = -1e4
"""A log-probability of nothing, in a sum that has a gradient."""


@dataclass(frozen=True)
class Vocabularies:
    """What two vocabularies have in common, as tensors on one device."""

    partner_V: torch.Tensor
    """int64 by teacher id: the student's id of the same token, or -1."""
    student_M: torch.Tensor
    """int64; the matched tokens' ids."""
    teacher_M: torch.Tensor
    """int64; the same tokens."""
    student_only_U: torch.Tensor
    """int64; the student's ids without a partner."""
    teacher_only_U: torch.Tensor
    """int64; the teacher's."""

    @staticmethod
    def of(matches: Matches, student_size: int, teacher_size: int, device: torch.device) -> "Vocabularies":
        partner, back = matches.partners(teacher_size), matches.reversed().partners(student_size)
        arrays = (partner, matches.student_M, matches.teacher_M, (back < 0).nonzero()[0], (partner < 0).nonzero()[0])
        return Vocabularies(*(torch.from_numpy(one).to(device) for one in arrays))


@dataclass(frozen=True)
class SpanPlaces:
    """Where spans lie among one side's positions."""

    first_S: torch.Tensor
    """int64."""
    past_S: torch.Tensor
    """int64."""

    def __len__(self) -> int:
        return len(self.first_S)

    @property
    def single_S(self) -> torch.Tensor:
        """bool; spans of one token."""
        return self.past_S - self.first_S == 1

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        return replace(self, first_S=change(self.first_S), past_S=change(self.past_S))

    def total(self, value_T: torch.Tensor) -> torch.Tensor:
        """Sum [S] over each span's positions."""
        lengths = self.past_S - self.first_S
        span_N = torch.repeat_interleave(torch.arange(len(self), device=lengths.device), lengths)
        within_N = torch.arange(len(span_N), device=lengths.device) - (lengths.cumsum(0) - lengths)[span_N]
        return value_T.new_zeros(len(self)).index_add(0, span_N, value_T[self.first_S[span_N] + within_N])


@dataclass(frozen=True)
class Named:
    """What the teacher says at the spans' first positions, as far as its payload tells."""

    ids_SK: torch.Tensor | None
    """int64 entries; none: the whole vocabulary, in order."""
    logp_SK: torch.Tensor
    tail_S: torch.Tensor | None
    """Probability of what is not named; none: everything is."""
    first_S: torch.Tensor
    """int64; the spans' first tokens."""
    first_logp_S: torch.Tensor
    chain_S: torch.Tensor
    """Log-probability of all of a span's tokens, one after the other."""
    known_S: torch.Tensor
    """bool; whether the payload tells of every token of the span; else the two above mean nothing."""
    single_S: torch.Tensor
    """bool; spans of one of the teacher's tokens."""


def named(targets: SoftTargets, logp_TV: torch.Tensor | None, places: SpanPlaces) -> Named:
    """``logp_TV``: the teacher's log-probabilities at every position, where it is not top-k targets that tell them."""
    label_T = targets.labels_T.long()
    first_S = places.first_S
    if isinstance(targets, TopkTargets):
        here_TK = targets.ids_TK == targets.labels_T[:, None]
        known_T = here_TK.any(-1)
        own_T = torch.where(here_TK, targets.logp_TK, 0.0).sum(-1)
        unknown_S = places.total((~known_T).float()) > 0
        tail_S = targets.tail_logp_T[first_S].exp()
        ids_SK, logp_SK = targets.ids_TK[first_S].long(), targets.logp_TK[first_S]
        return Named(
            ids_SK, logp_SK, tail_S, label_T[first_S], own_T[first_S], places.total(own_T), ~unknown_S, places.single_S
        )
    assert logp_TV is not None
    own_T = logp_TV.gather(1, label_T[:, None]).squeeze(1)
    known_S = torch.ones(len(places), dtype=torch.bool, device=logp_TV.device)
    return Named(
        None, logp_TV[first_S], None, label_T[first_S], own_T[first_S], places.total(own_T), known_S, places.single_S
    )


def teacher_logp(targets: SoftTargets, logits_TV: torch.Tensor | None) -> torch.Tensor | None:
    """Log-probabilities over the whole vocabulary, where ``targets`` or the logits made of them have it."""
    if isinstance(targets, DenseTargets):
        return targets.logp_TV
    return None if logits_TV is None else torch.log_softmax(logits_TV, -1)


@dataclass(frozen=True)
class Outcomes:
    """Both sides' probabilities of the same outcomes, and of tokens that one side alone has."""

    logp_SW: torch.Tensor
    """The teacher's: named outcomes, the span's own text, and all the rest; ``-inf`` where an outcome counts as rest."""
    logq_SW: torch.Tensor
    """The student's, with its gradient."""
    teacher_only_SU: torch.Tensor
    """Probabilities; 0 where nothing is known."""
    student_only_SU: torch.Tensor
    only_known_S: torch.Tensor | None
    """int64; how many of the teacher's own tokens its payload names; none: all."""


def outcomes(
    teacher: Named, logq_TV: torch.Tensor, label_T: torch.Tensor, places: SpanPlaces, vocabularies: Vocabularies
) -> Outcomes:
    """See ``aligned`` for what an outcome is; ``logq_TV``, ``label_T`` and ``places`` are the student's."""
    known_S, one_theirs_S, one_ours_S = teacher.known_S, teacher.single_S, places.single_S
    s1_S = label_T[places.first_S]
    logq_SV = logq_TV[places.first_S]
    own_T = logq_TV.gather(1, label_T[:, None]).squeeze(1)
    chain_q_S = places.total(own_T)
    # What is left of the first token's probability when the span's text is taken out of it.
    left_p_S = torch.where(
        one_theirs_S, -torch.inf, teacher.first_logp_S + _left(teacher.chain_S - teacher.first_logp_S)
    )
    left_p_S = torch.where(known_S, left_p_S, -torch.inf)
    left_q_S = torch.where(one_ours_S, -torch.inf, own_T[places.first_S] + _left(chain_q_S - own_T[places.first_S]))
    left_q_SV = logq_SV.scatter(1, s1_S[:, None], left_q_S[:, None])

    ids_SO, partner_SO, logp_SO = _matched(teacher, vocabularies)
    is_first_SO = ids_SO == teacher.first_S[:, None]
    spells_SO = (partner_SO == s1_S[:, None]) & one_ours_S[:, None]
    logp_SO = torch.where(is_first_SO, left_p_S[:, None], logp_SO)
    # A single token that spells the whole span says its text, whichever side it stands on.
    same_p_S = torch.where(spells_SO & ~is_first_SO, logp_SO, -torch.inf).logsumexp(-1)
    span_p_S = torch.where(known_S, torch.logaddexp(teacher.chain_S, same_p_S), -torch.inf)
    partner_S = vocabularies.partner_V[teacher.first_S]
    says_S = one_theirs_S & ~one_ours_S & (partner_S >= 0)
    same_q_S = torch.where(says_S, left_q_SV.gather(1, partner_S.clamp_min(0)[:, None]).squeeze(1), _NEVER)
    span_q_S = torch.where(known_S, torch.logaddexp(chain_q_S, same_q_S), -torch.inf)

    moved_SO = (partner_SO < 0) | spells_SO | (is_first_SO & (one_theirs_S | ~known_S)[:, None])
    logp_SO = torch.where(moved_SO, -torch.inf, logp_SO)
    logq_SO = torch.where(moved_SO, -torch.inf, left_q_SV.gather(1, partner_SO.clamp_min(0)))
    logp_SW, logq_SW = (
        torch.cat([named_SO, span_S[:, None], _rest(named_SO, span_S)[:, None]], dim=1)
        for named_SO, span_S in ((logp_SO, span_p_S), (logq_SO, span_q_S))
    )
    theirs_SU, count_S = _teacher_only(teacher, left_p_S, vocabularies)
    return Outcomes(logp_SW, logq_SW, theirs_SU, left_q_SV[:, vocabularies.student_only_U].exp(), count_S)


def _left(logp_S: torch.Tensor) -> torch.Tensor:
    """log(1 - p)."""
    return torch.log1p(-logp_S.clamp_max(-_LEAST).exp())


def _rest(logp_SO: torch.Tensor, span_S: torch.Tensor) -> torch.Tensor:
    return (1 - logp_SO.exp().sum(-1) - span_S.exp()).clamp_min(_LEAST).log()


def _matched(teacher: Named, vocabularies: Vocabularies) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(teacher's ids, student's ids or -1, log-probabilities), [S, O], of what is named and may be matched."""
    if teacher.ids_SK is not None:
        return teacher.ids_SK, vocabularies.partner_V[teacher.ids_SK], teacher.logp_SK
    shape = (len(teacher.logp_SK), -1)
    logp_SM = teacher.logp_SK[:, vocabularies.teacher_M]
    return vocabularies.teacher_M.expand(shape), vocabularies.student_M.expand(shape), logp_SM


def _teacher_only(
    teacher: Named, left_S: torch.Tensor, vocabularies: Vocabularies
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Probabilities [S, U] of the teacher's tokens without a partner, and how many of them are named."""
    ids_SU, logp_SU = vocabularies.teacher_only_U.expand(len(left_S), -1), None
    if teacher.ids_SK is None:
        logp_SU = teacher.logp_SK[:, vocabularies.teacher_only_U]
        return torch.where(ids_SU == teacher.first_S[:, None], left_S[:, None], logp_SU).exp(), None
    is_first_SK = teacher.ids_SK == teacher.first_S[:, None]
    only_SK = vocabularies.partner_V[teacher.ids_SK] < 0
    prob_SK = torch.where(is_first_SK, left_S[:, None], teacher.logp_SK).exp() * only_SK
    return prob_SK, only_SK.sum(-1)
