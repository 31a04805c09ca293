"""Targets for tests, straight from logits."""

import torch

from kdscale.batch import TopkTargets


def topk_of_logits(
    logits_TV: torch.Tensor, k: int, temperature: float = 1.0, dtype: torch.dtype = torch.float64
) -> TopkTargets:
    """Top-k targets by their definition; labels count up."""
    logp = torch.log_softmax(logits_TV.double() / temperature, -1)
    kept, ids = logp.topk(k)
    shift = temperature * torch.logsumexp(logits_TV.double() / temperature, -1) - torch.logsumexp(
        logits_TV.double(), -1
    )
    return TopkTargets(
        labels_T=torch.arange(len(logp), dtype=torch.int32) % logp.shape[1],
        ids_TK=ids.int(),
        logp_TK=kept.to(dtype),
        tail_logp_T=logp.exp().scatter(1, ids, 0.0).sum(-1).log().to(dtype),
        entropy_T=-(logp.exp() * logp).sum(-1).to(dtype),
        shift_T=shift.to(dtype),
        temperature=temperature,
    )
