"""The elementwise part of the fused loss: a block of logits becomes, in place, the gradient with respect to them.

B = positions of a block (few enough to stay in the processor's cache), V = true vocabulary, K = named entries. A block is
float32 and finite. What is returned per position are the statistics of ``STATS``.
"""

import torch

from kdscale.batch import DenseTargets, SampledTargets, SoftTargets, TopkTargets
from kdscale.errors import ConfigError
from kdscale.losses.divergence import Divergence, gradient, total
from kdscale.losses.objective import Objective
from kdscale.losses.sparse import kept_gradient, sampled_value

STATS = (
    "soft",
    "hard",
    "kl",
    "top1_agree",
    "teacher_entropy",
    "teacher_kept_mass",
    "student_kept_mass",
    "count",
    "told",
)
"""Names of the statistics, in order: sums over positions. ``kl`` is the forward KL at temperature 1, over what the payload
tells of it (NaN where it tells nothing); ``told`` counts the positions that targets tell of (with another tokenizer: spans)."""
OF_TOLD = ("top1_agree", "teacher_entropy", "teacher_kept_mass", "student_kept_mass")
"""Those whose mean is over what is ``told``, and not over all positions."""
_SOFT, _HARD, _KL, _TOP1, _ENTROPY, _TEACHER_KEPT, _STUDENT_KEPT, _COUNT, _TOLD = range(len(STATS))
_FORWARD = Divergence("forward_kl")
_RULED_OUT = -1e30
"""Log-probability of what the teacher rules out: of no mass, and finite also when a temperature multiplies it."""


def block_gradient(
    block_BV: torch.Tensor,
    labels_B: torch.Tensor,
    targets: SoftTargets | None,
    teacher_BV: torch.Tensor | None,
    objective: Objective,
    stats_BS: torch.Tensor,
) -> None:
    """Turn logits into the objective's gradient with respect to them, and fill in the statistics.

    ``teacher_BV`` holds the teacher's logits where the targets are hidden states; it is overwritten.
    """
    label = labels_B.long()[:, None]
    peak = block_BV.amax(-1, keepdim=True)
    block_BV.sub_(peak)
    at_label = block_BV.gather(1, label)
    stats_BS[:, _COUNT] = 1
    if targets is None:
        mass = block_BV.exp_().sum(-1, keepdim=True)
        stats_BS[:, _HARD] = (mass.log() - at_label).squeeze(1)
        block_BV.div_(mass)
        hard_weight = 1.0
    else:
        stats_BS[:, _TOLD] = 1
        hard_weight = objective.hard_weight
        match targets:
            case TopkTargets() | SampledTargets():
                _named(block_BV, at_label, targets, objective, stats_BS)
            case DenseTargets():
                logp = targets.logp_TV.to(block_BV.dtype, copy=True)
                _dense(block_BV, at_label, logp, targets.temperature, objective, stats_BS)
            case _:
                assert teacher_BV is not None
                _dense(block_BV, at_label, teacher_BV, 1.0, objective, stats_BS)
    if hard_weight:
        block_BV.scatter_add_(1, label, block_BV.new_full(label.shape, -hard_weight))


def _named(
    block_BV: torch.Tensor,
    at_label: torch.Tensor,
    targets: TopkTargets | SampledTargets,
    objective: Objective,
    stats_BS: torch.Tensor,
) -> None:
    """Targets that name K entries: the rest of the vocabulary shares one factor.

    ``block_BV`` has its row maximum at 0 and becomes the gradient of the soft loss plus ``hard_weight * softmax``.
    """
    tau, hard_weight = objective.temperature, objective.hard_weight
    if targets.temperature != tau:
        raise ConfigError(f"targets at temperature {targets.temperature:g} cannot serve temperature {tau:g}")
    ids_BK = targets.ids_TK.long()
    z_BK = block_BV.gather(1, ids_BK)
    hard_BV = None
    if tau != 1.0:
        # Both softmaxes are needed: the one at temperature 1 for the hard loss and the diagnostics.
        hard_BV = block_BV.exp()
        mass_B1 = hard_BV.sum(-1, keepdim=True)
        hard_BV.mul_(hard_weight / mass_B1)
        block_BV.div_(tau)
    prob_BV = block_BV.exp_()
    top1_B = _top1(targets)[:, None]
    stats_BS[:, _TOP1] = (prob_BV.gather(1, top1_B) >= 1.0).squeeze(1).to(stats_BS.dtype)
    e_BK = prob_BV.gather(1, ids_BK)
    if isinstance(targets, TopkTargets):
        # With the kept entries out of the way the rest sums to the tail: exact also where that is nearly nothing.
        prob_BV.scatter_(1, ids_BK, 0.0)
        tail_B1 = prob_BV.sum(-1, keepdim=True)
        soft_mass_B1 = tail_B1 + e_BK.sum(-1, keepdim=True)
        tail_logq_B = (tail_B1.log() - soft_mass_B1.log()).squeeze(1)
    else:
        soft_mass_B1 = prob_BV.sum(-1, keepdim=True)
    logq_BK = z_BK / tau - soft_mass_B1.log()
    if tau == 1.0:
        mass_B1 = soft_mass_B1
    logq1_BK = z_BK - mass_B1.log()
    stats_BS[:, _HARD] = (mass_B1.log() - at_label).squeeze(1)
    stats_BS[:, _ENTROPY] = targets.entropy_T
    factor = objective.soft_factor / tau
    shared = hard_weight if tau == 1.0 else 0.0
    if isinstance(targets, TopkTargets):
        value, kept_BK, tail_factor_B = kept_gradient(
            objective.divergence, targets.logp_TK, targets.tail_logp_T, logq_BK, tail_logq_B
        )
        stats_BS[:, _SOFT] = value
        stats_BS[:, _TEACHER_KEPT] = targets.logp_TK.exp().sum(-1)
        stats_BS[:, _STUDENT_KEPT] = logq_BK.exp().sum(-1)
        if tau == 1.0:
            is_kl = objective.divergence.name == "forward_kl"
            stats_BS[:, _KL] = (
                value
                if is_kl
                else kept_gradient(_FORWARD, targets.logp_TK, targets.tail_logp_T, logq_BK, tail_logq_B)[0]
            )
        else:
            stats_BS[:, _KL] = _kl_at_one(targets, logq1_BK)
        prob_BV.mul_((factor * tail_factor_B + shared)[:, None] / soft_mass_B1)
        prob_BV.scatter_(1, ids_BK, factor * kept_BK + shared * logq_BK.exp())
    else:
        weight_BK = targets.weight_TK
        used = weight_BK > 0
        stats_BS[:, _SOFT] = sampled_value(logq_BK, weight_BK, targets.entropy_T)
        stats_BS[:, _TEACHER_KEPT] = weight_BK.sum(-1)
        stats_BS[:, _STUDENT_KEPT] = (logq_BK.exp() * used).sum(-1)
        stats_BS[:, _KL] = stats_BS[:, _SOFT] if tau == 1.0 else torch.nan
        # Sum of the weights times q, minus the weights: the gradient of -sum(weight log q).
        prob_BV.mul_((factor * weight_BK.sum(-1, keepdim=True) + shared) / soft_mass_B1)
        prob_BV.scatter_add_(1, ids_BK, -factor * weight_BK)
    if hard_BV is not None:
        prob_BV.add_(hard_BV)


def _top1(targets: TopkTargets | SampledTargets) -> torch.Tensor:
    likeliest = targets.logp_TK if isinstance(targets, TopkTargets) else targets.weight_TK
    return targets.ids_TK.gather(1, likeliest.argmax(-1, keepdim=True)).squeeze(1).long()


def _kl_at_one(targets: TopkTargets, logq1_BK: torch.Tensor) -> torch.Tensor:
    """(K+1)-way forward KL at temperature 1 from targets at another: p_1 is proportional to p^temperature."""
    logp1_BK = (targets.temperature * targets.logp_TK + targets.shift_T[:, None]).clamp_max(0.0)
    # The temperature multiplies what an encoding has rounded, which may carry the kept mass above 1.
    logp1_BK = logp1_BK - logp1_BK.logsumexp(-1, keepdim=True).clamp_min(0.0)
    tiny = torch.finfo(logp1_BK.dtype).tiny
    tails = [(1 - logs.exp().sum(-1)).clamp_min(tiny).log() for logs in (logp1_BK, logq1_BK)]
    return kept_gradient(_FORWARD, logp1_BK, tails[0], logq1_BK, tails[1])[0]


def _dense(
    block_BV: torch.Tensor,
    at_label: torch.Tensor,
    teacher_BV: torch.Tensor,
    teacher_temperature: float,
    objective: Objective,
    stats_BS: torch.Tensor,
) -> None:
    """Targets over the whole vocabulary. ``teacher_BV``: logits at ``teacher_temperature`` up to a constant per row."""
    tau, hard_weight, kind = objective.temperature, objective.hard_weight, objective.divergence
    if teacher_temperature not in (1.0, tau):
        raise ConfigError(f"dense targets at temperature {teacher_temperature:g} cannot serve temperature {tau:g}")
    teacher_BV.clamp_min_(_RULED_OUT)
    if kind.name == "forward_kl" and tau == 1.0:
        _dense_forward(block_BV, at_label, teacher_BV, teacher_temperature, objective, stats_BS)
        return
    logq1_BV = torch.log_softmax(block_BV, -1)
    logp1_BV = torch.log_softmax(teacher_BV * teacher_temperature, -1)
    stats_BS[:, _HARD] = (block_BV.logsumexp(-1, keepdim=True) - at_label).squeeze(1)
    top1 = teacher_BV.argmax(-1, keepdim=True)
    stats_BS[:, _TOP1] = (block_BV.gather(1, top1) >= 0).squeeze(1).to(stats_BS.dtype)
    stats_BS[:, _TEACHER_KEPT] = stats_BS[:, _STUDENT_KEPT] = 1
    kl = total(_FORWARD, logp1_BV, logq1_BV, finite=True)
    stats_BS[:, _KL] = kl
    if tau == 1.0:
        logq_BV, logp_BV = logq1_BV, logp1_BV
    else:
        logq_BV = torch.log_softmax(block_BV / tau, -1)
        logp_BV = torch.log_softmax(teacher_BV * (teacher_temperature / tau), -1)
    stats_BS[:, _ENTROPY] = -(logp_BV.exp() * logp_BV).sum(-1)
    if kind.name == "logit_mse":
        gap = block_BV.sub_(teacher_BV.mul_(teacher_temperature))
        gap.sub_(gap.mean(-1, keepdim=True))
        stats_BS[:, _SOFT] = gap.square().mean(-1)
        grad = gap.mul_(2 * objective.soft_factor / gap.shape[-1])
    else:
        stats_BS[:, _SOFT] = total(kind, logp_BV, logq_BV, finite=True)
        grad = gradient(kind, logp_BV, logq_BV).mul_(objective.soft_factor / tau)
    if hard_weight:
        grad.add_(logq1_BV.exp_(), alpha=hard_weight)
    block_BV.copy_(grad)


def _dense_forward(
    block_BV: torch.Tensor,
    at_label: torch.Tensor,
    teacher_BV: torch.Tensor,
    teacher_temperature: float,
    objective: Objective,
    stats_BS: torch.Tensor,
) -> None:
    """The common case, forward KL at temperature 1, from one exponential a side: everything else are dot products."""
    if teacher_temperature != 1.0:
        teacher_BV.mul_(teacher_temperature)
    peak_B1, top1_B1 = teacher_BV.max(-1, keepdim=True)
    teacher_BV.sub_(peak_B1)
    stats_BS[:, _TOP1] = (block_BV.gather(1, top1_B1) >= 0).squeeze(1).to(stats_BS.dtype)
    p_BV = teacher_BV.exp()
    mass_p_B = p_BV.sum(-1)
    # Sums of p times its own logits and times the student's, before p is normalised.
    own_B, across_B = (torch.linalg.vecdot(p_BV, other) / mass_p_B for other in (teacher_BV, block_BV))
    q_BV = block_BV.exp_()
    mass_q_B1 = q_BV.sum(-1, keepdim=True)
    log_mass_q_B = mass_q_B1.log().squeeze(1)
    stats_BS[:, _ENTROPY] = mass_p_B.log() - own_B
    stats_BS[:, _SOFT] = stats_BS[:, _KL] = own_B - mass_p_B.log() - across_B + log_mass_q_B
    stats_BS[:, _HARD] = log_mass_q_B - at_label.squeeze(1)
    stats_BS[:, _TEACHER_KEPT] = stats_BS[:, _STUDENT_KEPT] = 1
    soft, hard = objective.soft_factor, objective.hard_weight
    q_BV.mul_((soft + hard) / mass_q_B1).sub_(p_BV.mul_((soft / mass_p_B)[:, None]))
