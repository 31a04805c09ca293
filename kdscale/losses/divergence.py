"""Divergences between dense distributions: the references that users and tests check everything else with.

T = positions, V = vocabulary. Plain PyTorch, any float dtype, differentiable; nothing is chunked.
"""

import torch

from kdscale.errors import ConfigError

NAMES = ("forward_kl", "reverse_kl", "jsd")


def divergence(
    name: str,
    student_logits_TV: torch.Tensor,
    teacher_logits_TV: torch.Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> torch.Tensor:
    """Divergence per position [T], in nats, of q = softmax(student / temperature) from p = softmax(teacher / temperature).

    - ``forward_kl``: KL(p ‖ q) (Hinton et al. 2015, arXiv 1503.02531)
    - ``reverse_kl``: KL(q ‖ p) (Gu et al. 2023, arXiv 2306.08543)
    - ``jsd``: M = beta p + (1 - beta) q; beta KL(p ‖ M) + (1 - beta) KL(q ‖ M) (Agarwal et al. 2023, arXiv 2306.13649,
      without their special cases at beta 0 and 1)

    A logit of ``-inf`` on both sides is an id that does not exist. No temperature factor is applied.

    Raises:
        ConfigError: unknown name, or ``beta`` outside (0, 1).
    """
    require_known(name, beta)
    logq = log_prob(student_logits_TV, temperature)
    logp = log_prob(teacher_logits_TV, temperature)
    return terms(name, logp, logq, beta).sum(-1)


def log_prob(logits_TV: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature), reduced in float32 at least."""
    wide = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    return torch.log_softmax(wide / temperature, dim=-1)


def require_known(name: str, beta: float) -> None:
    if name not in NAMES:
        raise ConfigError(f"divergence {name!r} is unknown; choose one of {', '.join(NAMES)}")
    if not 0 < beta < 1:
        raise ConfigError(f"beta = {beta} must lie strictly between 0 and 1; its ends are forward_kl and reverse_kl")


def terms(name: str, logp: torch.Tensor, logq: torch.Tensor, beta: float) -> torch.Tensor:
    """The summands of a divergence, elementwise over outcomes; an outcome impossible on both sides adds 0."""
    match name:
        case "forward_kl":
            return _weighted(logp, logp - logq)
        case "reverse_kl":
            return _weighted(logq, logq - logp)
        case _:
            logm = log_mixture(logp, logq, beta)
            return beta * _weighted(logp, logp - logm) + (1 - beta) * _weighted(logq, logq - logm)


def log_mixture(logp: torch.Tensor, logq: torch.Tensor, beta: float) -> torch.Tensor:
    """log(beta p + (1 - beta) q); ``-inf`` where neither is possible, with gradient 0 there."""
    weight = torch.tensor(beta, dtype=logp.dtype, device=logp.device)
    nowhere = (logp == -torch.inf) & (logq == -torch.inf)
    mixed = torch.logaddexp(
        logp.masked_fill(nowhere, 0.0) + weight.log(), logq.masked_fill(nowhere, 0.0) + (1 - weight).log()
    )
    return mixed.masked_fill(nowhere, -torch.inf)


def _weighted(log_weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """exp(log_weight) * value, 0 where the weight is 0 (there ``value`` may be infinite or NaN, in its gradient too)."""
    possible = log_weight > -torch.inf
    return torch.where(possible, log_weight, 0.0).exp() * torch.where(possible, value, 0.0)
