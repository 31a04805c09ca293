"""The loss of a student whose tokenizer is not its teacher's, over spans of bytes that both tokenizations end at.

S = spans, T = the student's positions trained on, C = positions of a chunk, V = the student's true vocabulary, D = hidden size.

A span holds the teacher's tokens t_1..t_n and the student's s_1..s_m, which spell the same bytes. With p and q the
distributions at the positions that predict t_1 and s_1, c_t = p(t_2 | t_1) .. p(t_n | ..), and c_s likewise, the outcomes of
a span are

    its text            p(t_1) c_t                        q(s_1) c_s
    a token of both     p(u)                              q(v)                 u and v spell the same bytes
    the rest            what those leave of 1             likewise

where the text is taken out of its first token: u = t_1 counts p(t_1) (1 - c_t), v = s_1 counts q(s_1) (1 - c_s). A single
token that spells the whole span counts as its text. So both sides are distributions over the same outcomes, and a span's
value is

    gold    D(p, q over the outcomes) + unmatched_weight * W
    uld     W over whole distributions

W is the sum over ranks of |p_(i) - q_(i)|, probabilities sorted from the largest, zeros behind the shorter: of the tokens
that one side alone has (``gold``), or of all at the first position (``uld``: Boizard et al. 2024, arXiv 2402.12030, whose
positions are here the beginnings of spans).

``gold`` follows GOLD (General On-Policy Logit Distillation, Hugging Face, 29 October 2025, and TRL's GOLDTrainer): merged
probabilities of spans, a divergence where vocabularies match, sorted probabilities elsewhere. GOLD multiplies the whole first
distribution by c_t; that is right for the text alone (TRL issue 5152), so only the text is here, and the rest is an outcome,
without which masses differ.

Top-k targets name some of this: a token that is not named, and a text of which a token is not, count as the rest on both
sides, and W goes over as many ranks as are named (``uld``: and one for all others). Each is a lower bound, and equal where
everything is named.

A batch's loss is the sum over spans, and the hard loss over all trained tokens beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from kdscale.batch import HiddenTargets, SoftTargets, TopkTargets
from kdscale.config.alignment import Method
from kdscale.errors import ConfigError
from kdscale.head import Head, HeadSpec, chunk_rows, finish_logits
from kdscale.losses.blocks import STATS
from kdscale.losses.divergence import Divergence, total
from kdscale.losses.objective import Objective
from kdscale.losses.spans import Named, Outcomes, SpanPlaces, Vocabularies, named, outcomes, teacher_logp


@dataclass(frozen=True)
class Alignment:
    """How a run's student learns across tokenizers."""

    method: Method
    unmatched_weight: float
    vocabularies: Vocabularies


@dataclass(frozen=True)
class AlignedTargets:
    """The teacher's targets of its own tokens, and where the spans lie on both sides."""

    soft: SoftTargets
    student: SpanPlaces
    teacher: SpanPlaces

    def to(self, device: torch.device) -> "AlignedTargets":
        parts = (one.each(lambda tensor: tensor.to(device, non_blocking=True)) for one in (self.student, self.teacher))
        return AlignedTargets(self.soft.each(lambda tensor: tensor.to(device, non_blocking=True)), *parts)

    def cut(self, spans: slice, start: int) -> "AlignedTargets":
        """The given spans, with the student's positions counted from ``start``."""
        ours, theirs = (one.each(lambda tensor: tensor[spans]) for one in (self.student, self.teacher))
        first, past = (int(theirs.first_S[0]), int(theirs.past_S[-1])) if len(theirs) else (0, 0)
        return AlignedTargets(
            self.soft.cut(slice(first, past)), ours.each(lambda one: one - start), theirs.each(lambda one: one - first)
        )


def aligned_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    spec: HeadSpec,
    labels_T: torch.Tensor,
    targets: AlignedTargets,
    objective: Objective,
    alignment: Alignment,
    *,
    chunk_bytes: int,
    teacher_head: Head | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the objective, float32; statistics ``STATS``, float32, detached); the contract of ``fused.fused_loss``.

    Statistics of the teacher are sums over spans: ``top1_agree`` counts those where the likeliest named outcome is the same,
    ``teacher_entropy`` is that over the outcomes, and the kept masses are those of all but the rest. ``kl`` is NaN.

    Raises:
        ConfigError: hidden targets without the teacher's head.
    """
    if isinstance(targets.soft, HiddenTargets) and teacher_head is None:
        raise ConfigError("hidden targets need the teacher's head; there is none")
    settings = (labels_T, targets, teacher_head, spec, objective, alignment, chunk_bytes)
    loss, stats = _AlignedLoss.apply(hidden_TD, weight_VD, bias_V, settings)
    return loss, stats


class _AlignedLoss(torch.autograd.Function):
    """Gradients are computed with the values, chunk by chunk, so that no [T, V] array is kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_TD: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, settings: tuple[Any, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        labels_T, targets, teacher_head, spec, objective, alignment, chunk_bytes = settings
        weight_VD = weight[: spec.vocab_size]
        sums = torch.zeros(1 + len(STATS), dtype=torch.float64, device=hidden_TD.device)
        needs = ctx.needs_input_grad[:3]
        grads = [
            torch.zeros(one.shape, dtype=dtype, device=one.device) if one is not None and need else None
            for one, dtype, need in zip(
                (hidden_TD, weight, bias), (hidden_TD.dtype, *[torch.float32] * 2), needs, strict=True
            )
        ]
        widest = spec.vocab_size + (
            len(alignment.vocabularies.partner_V) if not isinstance(targets.soft, TopkTargets) else 0
        )
        for part, spans in _chunks(len(labels_T), targets.student, chunk_rows(widest, chunk_bytes)):
            hidden_CD = hidden_TD[part].to(weight.dtype)
            logits_CV = finish_logits((hidden_CD @ weight_VD.T).float(), bias, spec).requires_grad_(any(needs))
            cut = targets.cut(spans, part.start)
            with torch.enable_grad():
                found = objective_sums(logits_CV, labels_T[part], cut, objective, alignment, teacher_head)
                if any(needs):
                    (slope_CV,) = torch.autograd.grad(found[0], [logits_CV])
            sums += found.detach().double()
            if not any(needs):
                continue
            if spec.softcap is not None:
                slope_CV *= 1 - (logits_CV.detach() / spec.softcap).square_()
            slope_CV *= spec.scale
            if grads[2] is not None:
                grads[2][: spec.vocab_size] += slope_CV.sum(0)
            slope_CV = slope_CV.to(weight.dtype)
            if grads[0] is not None:
                grads[0][part] = (slope_CV @ weight_VD).to(hidden_TD.dtype)
            if grads[1] is not None:
                grads[1][: spec.vocab_size] += slope_CV.T @ hidden_CD
        ctx.grads = [
            None if grad is None or one is None else grad.to(one.dtype)
            for grad, one in zip(grads, (hidden_TD, weight, bias), strict=True)
        ]
        loss, stats = sums[0].float(), sums[1:].float()
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        # In place, and therefore once: a second backward through the same graph finds nothing and fails.
        grads, ctx.grads = ctx.grads, None
        return (*(None if grad is None else grad.mul_(grad_loss) for grad in grads), None)


def _chunks(count: int, places: SpanPlaces, most: int) -> Iterator[tuple[slice, slice]]:
    """(positions, spans) of chunks of about ``most`` positions, none of which cuts a span."""
    firsts, pasts = places.first_S.tolist(), places.past_S.tolist()
    start = span = 0
    while start < count:
        stop, first_span = min(count, start + most), span
        while span < len(firsts) and pasts[span] <= stop:
            span += 1
        if span < len(firsts) and firsts[span] < stop:
            if firsts[span] > start:
                stop = firsts[span]
            else:
                stop, span = pasts[span], span + 1
        yield slice(start, stop), slice(first_span, span)
        start = stop


def objective_sums(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    targets: AlignedTargets,
    objective: Objective,
    alignment: Alignment,
    teacher_head: Head | None = None,
) -> torch.Tensor:
    """[1 + statistics]: the objective's sum and those of ``STATS``, differentiable; the reference, nothing chunked."""
    logq_CV = torch.log_softmax(logits_CV, -1)
    label_C = labels_C.long()
    hard = -logq_CV.gather(1, label_C[:, None]).sum()
    with torch.no_grad():
        logits = None
        if isinstance(targets.soft, HiddenTargets):
            assert teacher_head is not None
            logits = teacher_head.logits(targets.soft.hidden_TD)
        teacher = named(targets.soft, teacher_logp(targets.soft, logits), targets.teacher)
    found = outcomes(teacher, logq_CV, label_C, targets.student, alignment.vocabularies)
    if alignment.method == "gold":
        soft = gold(found, objective.divergence, alignment.unmatched_weight).sum()
    else:
        soft = uld(teacher, logq_CV[targets.student.first_S]).sum()
    stats = _statistics(found)
    values = {
        "soft": soft,
        "hard": hard,
        "count": hard.new_tensor(len(labels_C)),
        "kl": hard.new_tensor(torch.nan),
        **stats,
    }
    loss = objective.soft_factor * soft + objective.hard_weight * hard
    return torch.stack([loss, *(values[name] for name in STATS)])


def gold(found: Outcomes, divergence: Divergence, unmatched_weight: float) -> torch.Tensor:
    """Value [S] of each span; see the module."""
    value_S = total(divergence, found.logp_SW, found.logq_SW)
    if unmatched_weight == 0:
        return value_S
    ranked = sorted_distance(found.teacher_only_SU, found.student_only_SU, found.only_known_S)
    return value_S + unmatched_weight * ranked


def uld(teacher: Named, logq_SV: torch.Tensor) -> torch.Tensor:
    """Value [S] of each span; see the module."""
    prob_SV = logq_SV.exp()
    known_S = None
    if teacher.tail_S is not None:
        known_S = torch.full_like(teacher.first_S, teacher.logp_SK.shape[1])
    value_S = sorted_distance(teacher.logp_SK.exp(), prob_SV, known_S)
    if teacher.tail_S is None:
        return value_S
    named_SK = prob_SV.topk(min(teacher.logp_SK.shape[1], prob_SV.shape[1]), dim=-1).values
    return value_S + (teacher.tail_S - (1 - named_SK.sum(-1))).abs()


def sorted_distance(p_SU: torch.Tensor, q_SW: torch.Tensor, known_S: torch.Tensor | None) -> torch.Tensor:
    """Sum [S] over ranks of |p_(i) - q_(i)|, sorted from the largest, zeros behind the shorter; over ``known_S`` ranks where
    more of p is not known."""
    ranks = min(p_SU.shape[1], q_SW.shape[1])
    if ranks == 0 and known_S is None:
        return p_SU.sum(-1) + q_SW.sum(-1)
    top_p, top_q = (one.topk(ranks, dim=-1).values for one in (p_SU, q_SW))
    gap_SR = (top_p - top_q).abs()
    if known_S is None:
        beyond_S = (p_SU.sum(-1) - top_p.sum(-1)).clamp_min(0) + (q_SW.sum(-1) - top_q.sum(-1)).clamp_min(0)
        return gap_SR.sum(-1) + beyond_S
    return torch.where(torch.arange(ranks, device=gap_SR.device) < known_S[:, None], gap_SR, 0.0).sum(-1)


@torch.no_grad()
def _statistics(found: Outcomes) -> dict[str, torch.Tensor]:
    p_SW, q_SW = found.logp_SW.exp(), found.logq_SW.exp()
    best_S, place_S = p_SW[:, :-1].max(-1)
    same_S = (place_S == q_SW[:, :-1].argmax(-1)) & (best_S > 0)
    return {
        "told": same_S.new_tensor(len(same_S), dtype=p_SW.dtype),
        "top1_agree": same_S.sum().to(p_SW.dtype),
        "teacher_entropy": -torch.xlogy(p_SW, p_SW).sum(),
        "teacher_kept_mass": p_SW[:, :-1].sum(),
        "student_kept_mass": q_SW[:, :-1].sum(),
    }
