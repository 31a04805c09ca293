"""Hidden states to soft targets: the head by chunks of rows, temperature, then truncation.

T = positions, V = true vocabulary, K = kept entries, D = hidden size.
"""

import torch

from kdscale.batch import HiddenTargets, SoftTargets, TargetSpec, TopkTargets
from kdscale.head import Head, chunk_rows

CHUNK_BYTES = 64 << 20


def make_targets(hidden_TD: torch.Tensor, head: Head, labels_T: torch.Tensor, spec: TargetSpec) -> SoftTargets:
    """Soft targets of ``spec`` for positions whose final hidden states are ``hidden_TD``."""
    match spec.payload:
        case "topk":
            return topk_targets(hidden_TD, head, labels_T, k=spec.k, temperature=spec.temperature)
        case "hidden":
            return HiddenTargets(labels_T=labels_T.int().cpu(), hidden_TD=hidden_TD.to(torch.bfloat16).cpu())


@torch.no_grad()
def topk_targets(
    hidden_TD: torch.Tensor, head: Head, labels_T: torch.Tensor, *, k: int, temperature: float
) -> TopkTargets:
    """The ``k`` likeliest tokens per position at ``temperature``, with the exact log mass of all others.

    ``k`` beyond the vocabulary keeps all of it (and a tail of ``-inf``). Entries come likeliest first. Log-probabilities
    and tail are float32 whatever the model's dtype.
    """
    k = min(k, head.spec.vocab_size)
    rows = chunk_rows(head.spec.vocab_size, CHUNK_BYTES)
    ids, logps, tails, entropies = [], [], [], []
    for hidden in hidden_TD.split(rows) if len(hidden_TD) else [hidden_TD]:
        scaled = head.logits(hidden) / temperature
        lse = torch.logsumexp(scaled, dim=-1, keepdim=True)
        logp = scaled.sub_(lse)
        top_logp, top_ids = logp.topk(k, dim=-1)
        prob = logp.exp()
        # 0 * -inf: a token that the softcap or a mask rules out adds nothing.
        entropies.append(-(prob * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1))
        # Summing what is left, rather than 1 - sum(kept), keeps small tails exact.
        prob.scatter_(1, top_ids, 0.0)
        tails.append(prob.sum(-1).log())
        ids.append(top_ids.int())
        logps.append(top_logp)
    return TopkTargets(
        temperature=temperature,
        labels_T=labels_T.int().cpu(),
        ids_TK=torch.cat(ids).cpu(),
        logp_TK=torch.cat(logps).clamp_max(0.0).cpu(),
        tail_logp_T=torch.cat(tails).clamp_max(0.0).cpu(),
        entropy_T=torch.cat(entropies).cpu(),
    )
