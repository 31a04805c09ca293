"""Head and loss by chunks of rows: value and both gradients without any [T, V] array.

T = positions trained on, C = positions of a chunk, V = true vocabulary, D = hidden size, K = kept entries.

One float32 tile [C, V] goes through all stages in place: logits -> probabilities -> gradient -> the two products. The
gradients are computed in the forward pass, when the logits are there anyway; backward only multiplies them.
"""

from typing import Any

import torch

from kdscale.batch import TopkTargets
from kdscale.head import HeadSpec, chunk_rows
from kdscale.losses.objective import Objective
from kdscale.losses.sparse import kept_gradient

STATS = (
    "soft",
    "hard",
    "top1_agree",
    "teacher_entropy",
    "teacher_kept_mass",
    "student_kept_mass",
    "count",
)
"""Names of the statistics, in order: sums over positions."""


def fused_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    spec: HeadSpec,
    labels_T: torch.Tensor,
    targets: TopkTargets | None,
    objective: Objective,
    *,
    chunk_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the objective over the positions, float32; statistics ``STATS``, float32, detached).

    Differentiable with respect to hidden states, weight and bias. Products run in the weight's dtype, reductions in
    float32. Without targets the objective is the hard loss alone, whatever ``objective.hard_weight`` says of soft targets.
    The weight may have phantom rows beyond ``spec.vocab_size``: they take part in nothing and get gradient 0. The weight
    itself is not kept for backward (ZeRO-3 takes it away after the forward).
    """
    empty = hidden_TD.new_zeros((len(hidden_TD), 0))
    soft = (
        (empty.int(), empty, empty, empty)
        if targets is None
        else (targets.ids_TK, targets.logp_TK, targets.tail_logp_T, targets.entropy_T)
    )
    loss, stats = _FusedLoss.apply(hidden_TD, weight_VD, bias_V, labels_T, *soft, spec, objective, chunk_bytes)
    return loss, stats


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels_T: torch.Tensor,
        ids_TK: torch.Tensor,
        logp_TK: torch.Tensor,
        tail_logp_T: torch.Tensor,
        entropy_T: torch.Tensor,
        spec: HeadSpec,
        objective: Objective,
        chunk_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        need_grad = need_hidden or need_weight or need_bias
        weight_VD = weight[: spec.vocab_size]
        stats = torch.zeros(len(STATS), dtype=torch.float64, device=hidden_TD.device)
        grad_hidden = torch.empty_like(hidden_TD) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        grad_bias = (
            torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if need_bias and bias is not None else None
        )
        rows = min(chunk_rows(spec.vocab_size, chunk_bytes), max(1, len(hidden_TD)))
        tile = torch.empty(rows, spec.vocab_size, dtype=torch.float32, device=hidden_TD.device)
        for start in range(0, len(hidden_TD), rows):
            part = slice(start, start + rows)
            hidden_CD = hidden_TD[part].to(weight.dtype)
            logits_CV = _logits(hidden_CD, weight_VD, bias, spec, tile[: len(hidden_CD)])
            soft = (ids_TK[part], logp_TK[part], tail_logp_T[part], entropy_T[part]) if ids_TK.shape[1] else None
            grad_CV = _positions(logits_CV, labels_T[part], soft, objective, spec, stats, need_grad)
            if not need_grad:
                continue
            grad_low = grad_CV.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_low @ weight_VD
            if grad_weight is not None:
                grad_weight[: spec.vocab_size] += grad_low.T @ hidden_CD
            if grad_bias is not None:
                grad_bias[: spec.vocab_size] += grad_CV.sum(0)
        ctx.grads = [
            None if grad is None or of is None else grad.to(of.dtype)
            for grad, of in ((grad_hidden, hidden_TD), (grad_weight, weight), (grad_bias, bias))
        ]
        loss, sums = _combine(stats, objective, soft=ids_TK.shape[1] > 0).float(), stats.float()
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        # In place, and therefore once: a second backward through the same graph finds nothing and fails.
        grads, ctx.grads = ctx.grads, None
        return (*(None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in grads), *[None] * 8)


def _combine(stats: torch.Tensor, objective: Objective, *, soft: bool) -> torch.Tensor:
    values = dict(zip(STATS, stats, strict=True))
    if not soft:
        return values["hard"]
    return objective.soft_factor * values["soft"] + objective.hard_weight * values["hard"]


def _logits(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, bias: torch.Tensor | None, spec: HeadSpec, tile_CV: torch.Tensor
) -> torch.Tensor:
    """Logits in the tile."""
    if weight_VD.dtype == torch.float32:
        torch.mm(hidden_CD, weight_VD.T, out=tile_CV)
    else:
        tile_CV.copy_(hidden_CD @ weight_VD.T)
    if bias is not None:
        tile_CV += bias[: spec.vocab_size]
    if spec.scale != 1.0:
        tile_CV *= spec.scale
    if spec.softcap is not None:
        tile_CV.div_(spec.softcap).tanh_().mul_(spec.softcap)
    return tile_CV


def _positions(
    logits_CV: torch.Tensor,
    labels_C: torch.Tensor,
    soft: tuple[torch.Tensor, ...] | None,
    objective: Objective,
    spec: HeadSpec,
    stats: torch.Tensor,
    need_grad: bool,
) -> torch.Tensor:
    """Add a chunk's sums to ``stats`` and turn its logits into the gradient with respect to ``hidden @ weight.T``.

    The tile is reused in place. Two cases need a second one: a softcap, whose derivative is a function of the logits, and
    a temperature other than 1 beside a hard loss, which needs both softmaxes.
    """
    label = labels_C.long()[:, None]
    hard_weight = objective.hard_weight if soft is not None else 1.0
    slope = 1 - (logits_CV / spec.softcap).square_() if spec.softcap is not None and need_grad else None
    lse_C1 = torch.logsumexp(logits_CV, -1, keepdim=True)
    stats[1] += (lse_C1 - logits_CV.gather(1, label)).sum()
    stats[6] += len(label)
    if soft is None:
        grad = logits_CV.sub_(lse_C1).exp_()
    else:
        ids_CK, logp_CK, tail_logp_C, entropy_C = soft
        stats[2] += (logits_CV.argmax(-1) == ids_CK[:, 0]).sum()
        stats[3] += entropy_C.sum()
        stats[4] += logp_CK.exp().sum()
        grad = _soft(logits_CV, lse_C1, ids_CK.long(), logp_CK, tail_logp_C, objective, stats)
    if not need_grad:
        return grad
    if hard_weight:
        grad.scatter_add_(1, label, grad.new_full(label.shape, -hard_weight))
    if slope is not None:
        grad *= slope
    if spec.scale != 1.0:
        grad *= spec.scale
    return grad


def _soft(
    logits_CV: torch.Tensor,
    lse_C1: torch.Tensor,
    ids_CK: torch.Tensor,
    logp_CK: torch.Tensor,
    tail_logp_C: torch.Tensor,
    objective: Objective,
    stats: torch.Tensor,
) -> torch.Tensor:
    """Gradient of the soft loss plus ``hard_weight * softmax(logits)``: the hard loss without its label."""
    tau, hard_weight = objective.temperature, objective.hard_weight
    hard_CV = None
    if tau != 1.0:
        hard_CV = (logits_CV - lse_C1).exp_().mul_(hard_weight) if hard_weight else None
        logits_CV.div_(tau)
        lse_C1 = torch.logsumexp(logits_CV, -1, keepdim=True)
    logq_CV = logits_CV.sub_(lse_C1)
    logq_CK = logq_CV.gather(1, ids_CK)
    prob_CV = logq_CV.exp_()
    # With the kept entries out of the way the rest sums to the tail: exact also where that is nearly nothing.
    prob_CV.scatter_(1, ids_CK, 0.0)
    tail_logq_C = prob_CV.sum(-1).log()
    result = kept_gradient(objective.divergence, logp_CK, tail_logp_C, logq_CK, tail_logq_C, objective.beta)
    stats[0] += result.value_T.sum()
    stats[5] += logq_CK.exp().sum()
    factor = objective.soft_factor / tau
    shared = hard_weight if tau == 1.0 else 0.0
    prob_CV.mul_((factor * result.tail_factor_T + shared)[:, None])
    prob_CV.scatter_(1, ids_CK, factor * result.kept_TK + shared * logq_CK.exp())
    return prob_CV if hard_CV is None else prob_CV.add_(hard_CV)
