"""Divergences over targets that name only some of the vocabulary: top-k with a tail, and samples.

T = positions, V = vocabulary, K = named entries. ``topk``: the K kept entries and one tail bucket on both sides, a
(K+1)-way distribution; a lower bound of the full divergence that rises to it with K. ``sampled``: an estimate of p whose
expectation is p.
"""

import math

import torch

from kdscale.errors import ConfigError
from kdscale.losses.divergence import Divergence, gradient, log_prob, total
from kdscale.spec import SEPARABLE

_LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


def divergence(
    name: str,
    student_logits_TV: torch.Tensor,
    ids_TK: torch.Tensor,
    logp_TK: torch.Tensor,
    tail_logp_T: torch.Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    skew: float = 0.1,
) -> torch.Tensor:
    """Divergence per position [T], in nats; ``logp`` and ``tail_logp`` are the teacher's at ``temperature``.

    The reference: any float dtype, differentiable, nothing chunked. At K >= V - 1 it equals the dense divergence.

    Raises:
        ConfigError: a name that top-k targets don't carry, or a shape parameter out of its bounds.
    """
    if name not in SEPARABLE:
        raise ConfigError(f"divergence {name!r} cannot be had from top-k targets; choose one of {', '.join(SEPARABLE)}")
    logq_TV = log_prob(student_logits_TV, temperature)
    kept = torch.zeros_like(logq_TV, dtype=torch.bool).scatter_(1, ids_TK.long(), True)
    # Summing what is left, instead of 1 - sum(kept), is exact when nearly all mass is kept.
    rest = torch.where(kept, -torch.inf, logq_TV)
    has_tail = (~kept).any(-1)
    tail_logq_T = torch.where(has_tail, torch.logsumexp(torch.where(has_tail[:, None], rest, 0.0), -1), -torch.inf)
    ways = _ways(logp_TK.to(logq_TV.dtype), tail_logp_T, logq_TV.gather(1, ids_TK.long()), tail_logq_T)
    return total(Divergence(name, beta, skew), *ways)


def _ways(
    logp_TK: torch.Tensor, tail_logp_T: torch.Tensor, logq_TK: torch.Tensor, tail_logq_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K + 1 ways of both sides, [T, K + 1].

    A tail that has underflowed to nothing on one side alone would make the divergence infinite: it is given the smallest
    mass float32 knows. Where both sides have none (K = V) there is no bucket.
    """
    tail_logp = torch.where(tail_logq_T > -torch.inf, tail_logp_T.clamp_min(_LOG_TINY), tail_logp_T).to(logp_TK.dtype)
    tail_logq = torch.where(tail_logp_T > -torch.inf, tail_logq_T.clamp_min(_LOG_TINY), tail_logq_T).to(logq_TK.dtype)
    return torch.cat([logp_TK, tail_logp[:, None]], dim=1), torch.cat([logq_TK, tail_logq[:, None]], dim=1)


def kept_gradient(
    kind: Divergence,
    logp_TK: torch.Tensor,
    tail_logp_T: torch.Tensor,
    logq_TK: torch.Tensor,
    tail_logq_T: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value [T] of the (K+1)-way divergence and its derivative with respect to the student's scaled logits, in closed form.

    Returns (value_T, kept_TK, tail_factor_T): the kept entry i gets ``kept_TK[i]``, any other j gets
    ``q_j * tail_factor_T``.
    """
    logp, logq = _ways(logp_TK, tail_logp_T, logq_TK, tail_logq_T)
    grad, tail_q = gradient(kind, logp, logq), logq[:, -1].exp()
    factor = torch.where(tail_q > 0, grad[:, -1] / tail_q.clamp_min(torch.finfo(tail_q.dtype).tiny), 0.0)
    return total(kind, logp, logq), grad[:, :-1], factor


def sampled_divergence(
    student_logits_TV: torch.Tensor,
    ids_TK: torch.Tensor,
    weight_TK: torch.Tensor,
    entropy_T: torch.Tensor,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Estimate of the forward KL per position [T] from weighted samples with E[weights at id] = p(id), in nats.

    ``-sum(weight log q) - entropy``: unbiased in value and gradient where the draws are, and not bounded by 0 (Anshumann et
    al. 2025, arXiv 2503.16870, equation 4; the teacher's entropy at ``temperature`` makes a divergence of it).
    """
    logq_TK = log_prob(student_logits_TV, temperature).gather(1, ids_TK.long())
    return sampled_value(logq_TK, weight_TK, entropy_T)


def sampled_value(logq_TK: torch.Tensor, weight_TK: torch.Tensor, entropy_T: torch.Tensor) -> torch.Tensor:
    return -(weight_TK * logq_TK).sum(-1) - entropy_T
