"""Divergences between dense distributions: the references that users and tests check everything else with.

T = positions, V = vocabulary, W = outcomes (V, or K kept entries and a tail). Plain PyTorch, any float dtype; nothing is
chunked. p is the teacher's distribution, q the student's.
"""

from dataclasses import dataclass

import torch

from kdscale.errors import ConfigError
from kdscale.spec import DIVERGENCES


@dataclass(frozen=True)
class Divergence:
    """A divergence with its shape: what its name leaves open."""

    name: str
    beta: float = 0.5
    """Weight of the teacher in ``jsd``'s mixture, strictly in (0, 1)."""
    skew: float = 0.1
    """Weight of the first distribution in the mixture of the skewed divergences, in [0, 1)."""
    head_mass: float = 0.5
    """``adaptive_kl``: the least likely outcomes up to this running mass of the teacher are its tail, in (0, 1)."""

    def __post_init__(self) -> None:
        if self.name not in DIVERGENCES:
            raise ConfigError(f"divergence {self.name!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
        if not 0 < self.beta < 1:
            raise ConfigError(
                f"beta = {self.beta} must lie strictly between 0 and 1; its ends are forward_kl and reverse_kl"
            )
        if not 0 <= self.skew < 1:
            raise ConfigError(f"skew = {self.skew} must lie in [0, 1)")
        if not 0 < self.head_mass < 1:
            raise ConfigError(f"head_mass = {self.head_mass} must lie strictly between 0 and 1")

    def temperature_factor(self, temperature: float) -> float:
        """s(temperature), which keeps the gradient's size about independent of the temperature: its square for the KL
        family (Hinton et al. 2015, section 2), itself for ``tvd``, 1 for ``logit_mse``."""
        return {"tvd": temperature, "logit_mse": 1.0}.get(self.name, temperature**2)


def divergence(
    name: str,
    student_logits_TV: torch.Tensor,
    teacher_logits_TV: torch.Tensor,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
    skew: float = 0.1,
    head_mass: float = 0.5,
) -> torch.Tensor:
    """Divergence per position [T], in nats, of q = softmax(student / temperature) from p = softmax(teacher / temperature).

    - ``forward_kl``: KL(p ‖ q) (Hinton et al. 2015, arXiv 1503.02531)
    - ``reverse_kl``: KL(q ‖ p) (Gu et al. 2023, arXiv 2306.08543)
    - ``jsd``: M = beta p + (1 - beta) q; beta KL(p ‖ M) + (1 - beta) KL(q ‖ M) (Agarwal et al. 2023, arXiv 2306.13649,
      without their special cases at beta 0 and 1)
    - ``skew_forward_kl``: KL(p ‖ skew p + (1 - skew) q) (Ko et al. 2024, arXiv 2402.03898)
    - ``skew_reverse_kl``: KL(q ‖ skew q + (1 - skew) p) (same)
    - ``adaptive_kl``: forward and reverse KL, weighted by the share of sum |p - q| that lies in the teacher's head and in
      its tail; the weights are constants to the gradient (Wu et al. 2024, arXiv 2404.02657)
    - ``tvd``: 1/2 sum |p - q| (Wen et al. 2023, arXiv 2307.15190)
    - ``logit_mse``: mean over V of the squared difference of the centred logits, whatever the temperature (Ba & Caruana
      2014, arXiv 1312.6184)

    A logit of ``-inf`` on both sides is an id that does not exist. No temperature factor is applied.

    Raises:
        ConfigError: unknown name, or a shape parameter out of its bounds.
    """
    kind = Divergence(name, beta, skew, head_mass)
    if name == "logit_mse":
        return _logit_mse(student_logits_TV, teacher_logits_TV)
    return total(kind, log_prob(teacher_logits_TV, temperature), log_prob(student_logits_TV, temperature))


def log_prob(logits_TV: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature), reduced in float32 at least."""
    return torch.log_softmax(_wide(logits_TV) / temperature, dim=-1)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def total(kind: Divergence, logp: torch.Tensor, logq: torch.Tensor, *, finite: bool = False) -> torch.Tensor:
    """The divergence over the last dimension; ``finite``: no log-probability is ``-inf``, which saves the masks."""
    if kind.name != "adaptive_kl":
        return terms(kind, logp, logq, finite=finite).sum(-1)
    forward, reverse = (
        terms(Divergence(name), logp, logq, finite=finite).sum(-1) for name in ("forward_kl", "reverse_kl")
    )
    head = head_share(logp, logq, kind.head_mass)
    return head * forward + (1 - head) * reverse


def terms(kind: Divergence, logp: torch.Tensor, logq: torch.Tensor, *, finite: bool = False) -> torch.Tensor:
    """The summands of a separable divergence, elementwise; an outcome impossible on both sides adds 0."""

    def kl(log_weight: torch.Tensor, log_other: torch.Tensor) -> torch.Tensor:
        return _weighted(log_weight, log_weight - log_other, finite)

    match kind.name:
        case "forward_kl":
            return kl(logp, logq)
        case "reverse_kl":
            return kl(logq, logp)
        case "jsd":
            logm = log_mixture(logp, logq, kind.beta)
            return kind.beta * kl(logp, logm) + (1 - kind.beta) * kl(logq, logm)
        case "skew_forward_kl":
            return kl(logp, log_mixture(logp, logq, kind.skew))
        case "skew_reverse_kl":
            return kl(logq, log_mixture(logq, logp, kind.skew))
        case "tvd":
            return 0.5 * (logp.exp() - logq.exp()).abs()
        case _:
            raise ConfigError(f"divergence {kind.name!r} is not a sum over outcomes")


def log_mixture(loga: torch.Tensor, logb: torch.Tensor, weight: float) -> torch.Tensor:
    """log(weight a + (1 - weight) b); ``-inf`` where neither is possible, with gradient 0 there."""
    share = torch.tensor(weight, dtype=loga.dtype, device=loga.device)
    nowhere = (loga == -torch.inf) & (logb == -torch.inf)
    mixed = torch.logaddexp(
        loga.masked_fill(nowhere, 0.0) + share.log(), logb.masked_fill(nowhere, 0.0) + (1 - share).log()
    )
    return mixed.masked_fill(nowhere, -torch.inf)


def _weighted(log_weight: torch.Tensor, value: torch.Tensor, finite: bool) -> torch.Tensor:
    """exp(log_weight) * value, 0 where the weight is 0 (there ``value`` may be infinite or NaN, in its gradient too)."""
    if finite:
        return log_weight.exp() * value
    possible = log_weight > -torch.inf
    return torch.where(possible, log_weight, 0.0).exp() * torch.where(possible, value, 0.0)


def head_share(logp: torch.Tensor, logq: torch.Tensor, head_mass: float) -> torch.Tensor:
    """g_head / (g_head + g_tail) of ``adaptive_kl``, without gradient; 1/2 where p equals q."""
    with torch.no_grad():
        p = logp.exp()
        ascending, order = p.sort(dim=-1)
        tail = ascending.cumsum(-1) <= head_mass
        gap = (p - logq.exp()).abs().gather(-1, order)
        g_tail, g_all = (gap * tail).sum(-1), gap.sum(-1)
        return torch.where(g_all > 0, (g_all - g_tail) / g_all, 0.5)


def _logit_mse(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> torch.Tensor:
    student, teacher = _wide(student_logits_TV), _wide(teacher_logits_TV)
    real = ~((student == -torch.inf) & (teacher == -torch.inf))
    count = real.sum(-1, keepdim=True)
    gap = torch.where(real, student, 0.0) - torch.where(real, teacher, 0.0)
    centred = torch.where(real, gap - gap.sum(-1, keepdim=True) / count, 0.0)
    return centred.square().sum(-1) / count.squeeze(-1)


def gradient(kind: Divergence, logp: torch.Tensor, logq: torch.Tensor) -> torch.Tensor:
    """Closed-form derivative with respect to u, where logq = log_softmax(u), over any number of outcomes.

    With h = dD/dq, outcome j gets q_j h_j - q_j sum(q h). ``q h`` is formed directly where h alone would overflow.
    """
    q = logq.exp()
    match kind.name:
        case "forward_kl":
            return q - logp.exp()
        case "reverse_kl":
            qh = torch.where(q > 0, q * (logq - logp), 0.0)
        case "jsd":
            qh = torch.where(q > 0, (1 - kind.beta) * q * (logq - log_mixture(logp, logq, kind.beta)), 0.0)
        case "skew_forward_kl":
            logm = log_mixture(logp, logq, kind.skew)
            qh = torch.where(q > 0, -(1 - kind.skew) * (logp + logq - logm).exp(), 0.0)
        case "skew_reverse_kl":
            logm = log_mixture(logq, logp, kind.skew)
            # Without a share of q in the mixture its ratio has no bound, and no part in the derivative.
            share = kind.skew * (logq - logm).exp() if kind.skew else 0.0
            qh = torch.where(q > 0, q * (logq - logm - share), 0.0)
        case "tvd":
            qh = 0.5 * q * torch.sign(logq - logp)
        case "adaptive_kl":
            head = head_share(logp, logq, kind.head_mass).unsqueeze(-1)
            parts = [gradient(Divergence(name), logp, logq) for name in ("forward_kl", "reverse_kl")]
            return head * parts[0] + (1 - head) * parts[1]
        case _:
            raise ConfigError(f"divergence {kind.name!r} is not a function of probabilities")
    return qh - q * qh.sum(-1, keepdim=True)
