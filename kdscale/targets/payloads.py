"""Hidden states to soft targets: the head by chunks of rows, temperature, then what the payload keeps of it.

T = positions, C = positions of a chunk, V = true vocabulary, K = named entries, D = hidden size.
"""

import numpy as np
import torch

from kdscale.batch import DenseTargets, HiddenTargets, SampledTargets, SoftTargets, TopkTargets
from kdscale.head import Head, chunk_rows
from kdscale.spec import TargetSpec
from kdscale.targets.sampling import draw_replacement, draw_threshold

CHUNK_BYTES = 64 << 20
_BLOCK_BYTES = 1 << 20
"""On processors: elementwise work goes through a chunk by blocks that stay in the cache."""


@torch.no_grad()
def make_targets(
    hidden_TD: torch.Tensor, head: Head, labels_T: torch.Tensor, spec: TargetSpec, uniforms_T: np.ndarray | None = None
) -> SoftTargets:
    """Soft targets of ``spec`` for positions whose final hidden states are ``hidden_TD``.

    ``uniforms_T``: for ``sampled``, one number in [0, 1) per position, from which its draws follow.
    """
    labels_T = labels_T.int().cpu()
    if spec.payload == "hidden":
        return HiddenTargets(labels_T, hidden_TD.to(torch.bfloat16).cpu())
    if spec.payload == "sampled" and uniforms_T is None:
        raise ValueError("sampled targets need one uniform number per position")
    parts = []
    rows = chunk_rows(head.spec.vocab_size, CHUNK_BYTES)
    for start in range(0, max(1, len(hidden_TD)), rows):
        logits_CV = head.logits(hidden_TD[start : start + rows])
        block = chunk_rows(head.spec.vocab_size, _BLOCK_BYTES) if logits_CV.device.type == "cpu" else len(logits_CV)
        for inner in range(0, max(1, len(logits_CV)), max(1, block)):
            at = slice(start + inner, start + min(inner + max(1, block), len(logits_CV)))
            logits_BV = logits_CV[inner : inner + max(1, block)]
            uniforms = None if uniforms_T is None else uniforms_T[at]
            parts.append(targets_of_logits(logits_BV, labels_T[at], spec, uniforms))
    return SoftTargets.join(parts)


def targets_of_logits(
    logits_BV: torch.Tensor, labels_B: torch.Tensor, spec: TargetSpec, uniforms_B: np.ndarray | None = None
) -> SoftTargets:
    """Soft targets of a block of logits, which is overwritten."""
    tau = spec.temperature
    shift_B1 = None
    if tau != 1.0:
        lse1_B1 = torch.logsumexp(logits_BV, -1, keepdim=True)
        logits_BV.div_(tau)
    lse_B1 = torch.logsumexp(logits_BV, -1, keepdim=True)
    # tau * (z / tau - lse) + shift = z - lse at temperature 1.
    shift_B1 = tau * lse_B1 - lse1_B1 if tau != 1.0 else torch.zeros_like(lse_B1)
    logp_BV = logits_BV.sub_(lse_B1)
    if spec.payload == "dense":
        return DenseTargets(labels_B, logp_BV.clamp_max(0.0).cpu(), tau)
    k = min(spec.k, logp_BV.shape[-1])
    top_logp, top_ids = logp_BV.topk(k, dim=-1)
    prob_BV = logp_BV.exp()
    # 0 * -inf: a token that the softcap or a mask rules out adds nothing.
    entropy_B = -_row_dot(prob_BV, logp_BV.clamp_min_(torch.finfo(logp_BV.dtype).min))
    if spec.payload == "sampled":
        assert uniforms_B is not None
        draw = draw_threshold if spec.sampler == "threshold" else draw_replacement
        uniforms = torch.from_numpy(uniforms_B).to(prob_BV.device)
        ids_BK, weight_BK, count_B, kept_B = draw(prob_BV, top_ids, k, uniforms)
        counts = (count_B.int().cpu(), kept_B.int().cpu())
        return SampledTargets(labels_B, ids_BK.int().cpu(), weight_BK.cpu(), *counts, entropy_B.cpu(), tau)
    # Summing what is left, rather than 1 - sum(kept), keeps small tails exact.
    prob_BV.scatter_(1, top_ids, 0.0)
    return TopkTargets(
        labels_T=labels_B,
        ids_TK=top_ids.int().cpu(),
        logp_TK=top_logp.clamp_max(0.0).cpu(),
        tail_logp_T=prob_BV.sum(-1).log().clamp_max(0.0).cpu(),
        entropy_T=entropy_B.cpu(),
        shift_T=shift_B1.squeeze(1).cpu(),
        temperature=tau,
    )


def _row_dot(a_BV: torch.Tensor, b_BV: torch.Tensor) -> torch.Tensor:
    """Sum of the products along each row, without a temporary."""
    return torch.linalg.vecdot(a_BV, b_BV)
