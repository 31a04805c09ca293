"""Hidden states to soft targets: the head by chunks of rows, temperature, then what the payload keeps of it.

T = positions, C = positions of a chunk, V = true vocabulary, K = named entries, D = hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from kdscale.batch import DenseTargets, HiddenTargets, SampledTargets, SoftTargets, TopkTargets
from kdscale.head import Head, chunk_rows
from kdscale.spec import TargetSpec
from kdscale.targets.codec import narrow_ids, narrow_logp
from kdscale.targets.sampling import draw_replacement, draw_threshold

CHUNK_BYTES = 64 << 20
_GROUP = 32
_BLOCK_BYTES = 1 << 20
"""On processors: elementwise work goes through a chunk by blocks that stay in the cache."""


@torch.no_grad()
def make_targets(
    hidden_TD: torch.Tensor,
    head: Head,
    labels_T: torch.Tensor,
    spec: TargetSpec,
    uniforms_T: np.ndarray | None = None,
    *,
    as_sent: bool = False,
) -> SoftTargets:
    """Soft targets of ``spec`` for positions whose final hidden states are ``hidden_TD``.

    ``uniforms_T``: for ``sampled``, one number in [0, 1) per position, from which its draws follow.
    ``as_sent``: only to be encoded, so top-k entries are rounded where they are computed: half as much leaves the device and
    waits to be sent.
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
            parts.append(targets_of_logits(logits_BV, labels_T[at], spec, uniforms, as_sent=as_sent))
    return SoftTargets.join(parts)


def with_layers(targets: SoftTargets, states: Sequence[torch.Tensor]) -> SoftTargets:
    """``targets`` with the hidden states [T, D] of layers, as they travel; themselves where there are none."""
    if not states:
        return targets
    return replace(targets, layers_TND=torch.stack([one.to(torch.bfloat16) for one in states], dim=1).cpu())


def targets_of_logits(
    logits_BV: torch.Tensor,
    labels_B: torch.Tensor,
    spec: TargetSpec,
    uniforms_B: np.ndarray | None = None,
    *,
    as_sent: bool = False,
) -> SoftTargets:
    """Soft targets of a block of logits, which is overwritten. ``as_sent``: see ``make_targets``."""
    tau = spec.temperature
    shift_B1 = torch.zeros_like(logits_BV[:, :1])
    if tau != 1.0:
        lse1_B1 = torch.logsumexp(logits_BV, -1, keepdim=True)
        logits_BV.div_(tau)
    if spec.payload == "dense":
        logits_BV.sub_(torch.logsumexp(logits_BV, -1, keepdim=True))
        return DenseTargets(labels_B, logits_BV.clamp_max_(0.0).cpu(), tau)
    k = min(spec.k, logits_BV.shape[-1])
    top_BK, top_ids_BK = largest(logits_BV, k)
    peak_B1 = top_BK[:, :1]
    # exp(-inf) = 0 times -inf: a token that the softcap or a mask rules out adds nothing.
    centred_BV = logits_BV.sub_(peak_B1).clamp_min_(torch.finfo(logits_BV.dtype).min)
    weight_BV = centred_BV.exp()
    mass_B1 = weight_BV.sum(-1, keepdim=True)
    log_mass_B1 = mass_B1.log()
    entropy_B = (log_mass_B1 - _row_dot(weight_BV, centred_BV)[:, None] / mass_B1).squeeze(1)
    if tau != 1.0:
        # tau * (z / tau - lse) + shift = z - lse at temperature 1.
        shift_B1 = tau * (peak_B1 + log_mass_B1) - lse1_B1
    if spec.payload == "sampled":
        assert uniforms_B is not None
        draw = draw_threshold if spec.sampler == "threshold" else draw_replacement
        uniforms = torch.from_numpy(uniforms_B).to(weight_BV.device)
        ids_BK, weight_BK, count_B, kept_B = draw(weight_BV.div_(mass_B1), top_ids_BK, k, uniforms)
        counts = (count_B.int().cpu(), kept_B.int().cpu())
        return SampledTargets(labels_B, ids_BK.int().cpu(), weight_BK.cpu(), *counts, entropy_B.cpu(), tau)
    # Summing what is left, rather than 1 - sum(kept), keeps small tails exact.
    tail_B1 = weight_BV.scatter_(1, top_ids_BK, 0.0).sum(-1, keepdim=True)
    ids_BK, logp_BK = top_ids_BK, top_BK.sub(peak_B1).sub_(log_mass_B1).clamp_max_(0.0)
    if as_sent:
        ids_BK, logp_BK = narrow_ids(ids_BK, spec, logits_BV.shape[-1]), narrow_logp(logp_BK, spec)
    return TopkTargets(
        labels_T=labels_B,
        ids_TK=(ids_BK.int() if ids_BK.dtype == torch.int64 else ids_BK).cpu(),
        logp_TK=logp_BK.cpu(),
        tail_logp_T=(tail_B1.log() - log_mass_B1).clamp_max_(0.0).squeeze(1).cpu(),
        entropy_T=entropy_B.cpu(),
        shift_T=shift_B1.squeeze(1).cpu(),
        temperature=tau,
    )


def largest(values_BV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [B, k], indices [B, k]) of the k largest of each row, largest first; what ``topk`` gives, up to ties.

    Looked for in groups: the k largest lie in the k groups with the largest maxima, so only those are searched. On a processor
    that takes a fifth of the time where groups are many.
    """
    groups = values_BV.shape[-1] // _GROUP
    if values_BV.device.type != "cpu" or groups < 4 * k:
        return values_BV.topk(k, dim=-1)
    whole = groups * _GROUP
    grouped_BGN = values_BV[:, :whole].unflatten(-1, (groups, _GROUP))
    group_Bk = grouped_BGN.amax(-1).topk(k, dim=-1, sorted=False).indices
    index_BC = (group_Bk[..., None] * _GROUP + torch.arange(_GROUP)).flatten(1)
    if whole < values_BV.shape[-1]:
        rest = torch.arange(whole, values_BV.shape[-1]).expand(len(values_BV), -1)
        index_BC = torch.cat([index_BC, rest], dim=1)
    found_Bk, place_Bk = values_BV.gather(1, index_BC).topk(k, dim=-1)
    return found_Bk, index_BC.gather(1, place_Bk)


def _row_dot(a_BV: torch.Tensor, b_BV: torch.Tensor) -> torch.Tensor:
    """Sum of the products along each row, without a temporary."""
    return torch.linalg.vecdot(a_BV, b_BV)
