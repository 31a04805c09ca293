"""Divergences over top-k targets: K kept entries and one tail bucket on both sides, a (K+1)-way distribution.

T = positions, V = vocabulary, K = kept entries. A lower bound of the full divergence that rises to it with K.
"""

import math
from dataclasses import dataclass

import torch

from kdscale.losses.divergence import log_mixture, log_prob, require_known, terms

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
) -> torch.Tensor:
    """Divergence per position [T], in nats; ``logp`` and ``tail_logp`` are the teacher's at ``temperature``.

    The reference: any float dtype, differentiable, nothing chunked. At K >= V - 1 it equals the dense divergence.

    Raises:
        ConfigError: unknown name, or ``beta`` outside (0, 1).
    """
    require_known(name, beta)
    logq_TV = log_prob(student_logits_TV, temperature)
    kept = torch.zeros_like(logq_TV, dtype=torch.bool).scatter_(1, ids_TK.long(), True)
    # Summing what is left, instead of 1 - sum(kept), is exact when nearly all mass is kept.
    rest = torch.where(kept, -torch.inf, logq_TV)
    has_tail = (~kept).any(-1)
    tail_logq_T = torch.where(has_tail, torch.logsumexp(torch.where(has_tail[:, None], rest, 0.0), -1), -torch.inf)
    logp_TW, logq_TW = _ways(logp_TK.to(logq_TV.dtype), tail_logp_T, logq_TV.gather(1, ids_TK.long()), tail_logq_T)
    return terms(name, logp_TW, logq_TW, beta).sum(-1)


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


@dataclass(frozen=True)
class KeptGradient:
    """Derivative of the divergence with respect to the student's scaled logits u, in the form the fused loss needs.

    kept i: ``kept_TK[i]``; any other j: ``q_j * tail_factor_T``.
    """

    value_T: torch.Tensor
    kept_TK: torch.Tensor
    tail_factor_T: torch.Tensor


def kept_gradient(
    name: str,
    logp_TK: torch.Tensor,
    tail_logp_T: torch.Tensor,
    logq_TK: torch.Tensor,
    tail_logq_T: torch.Tensor,
    beta: float,
) -> KeptGradient:
    """Value and gradient of the (K+1)-way divergence, in closed form.

    With h = dD/dq over the K+1 ways: du_j = q_j (h_way(j) - sum over ways q h). ``q h`` is formed directly where h alone
    would overflow.
    """
    logp, logq = _ways(logp_TK, tail_logp_T, logq_TK, tail_logq_T)
    value = terms(name, logp, logq, beta).sum(-1)
    q = logq.exp()
    match name:
        case "forward_kl":
            qh = -logp.exp()
        case "reverse_kl":
            qh = terms(name, logp, logq, beta) + q
        case _:
            qh = torch.where(q > 0, (1 - beta) * q * (logq - log_mixture(logp, logq, beta)), 0.0)
    mean = qh.sum(-1, keepdim=True)
    grad = qh - q * mean
    tiny = torch.finfo(q.dtype).tiny
    return KeptGradient(value, grad[:, :-1], torch.where(q[:, -1] > 0, grad[:, -1] / q[:, -1].clamp_min(tiny), 0.0))
