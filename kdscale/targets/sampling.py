"""Unbiased samples of a distribution: a few tokens with weights whose expectation is the distribution.

B = positions, V = vocabulary, K = draws. Every draw follows from one uniform number per position, so that a repeated
request gives the same targets.
"""

import numpy as np
import torch
import xxhash

from kdscale.batch import Batch

# A point at the very end of the line would find no entry, or one of no width.
_BELOW_ONE = 1 - 1e-12


def uniforms(batch: Batch, seed: int) -> np.ndarray:
    """One number in [0, 1) per trained position (float64 [T], row-major), a pure function of (seed, batch number, the row's
    tokens, column): neither the cut into micro-batches nor who scores them matters."""
    rows = np.empty(batch.trained.shape, np.float64)
    for row, ids in enumerate(batch.inputs):
        key = xxhash.xxh3_128_intdigest(ids.tobytes() + np.int64(batch.number).tobytes(), seed=seed)
        rows[row] = np.random.Generator(np.random.Philox(key=key)).random(rows.shape[1:])
    return rows[batch.trained]


def draw_threshold(
    prob_BV: torch.Tensor, top_ids_BK: torch.Tensor, k: int, uniforms_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids [B, K], weights [B, K], count [B], kept [B]) by threshold sampling.

    A position gets ``n = ceil(sum min(1, k p))`` entries, at most k: few where the distribution is peaked. With t such that
    ``sum min(1, p / t) = n`` (so t is about 1/k), every p >= t is kept with its own weight, and the others are included
    with probability p / t by systematic sampling, each with weight t: the weights sum to 1. Those of all sampled entries
    are equal, which is what keeps their noise low (Kish 1965, section 7.4; Duffield, Lund & Thorup 2007 for the threshold).
    Kept entries come first, likeliest first. ``prob_BV`` is overwritten.
    """
    k = min(k, prob_BV.shape[1])
    index_K = torch.arange(k, device=prob_BV.device)
    top_BK = prob_BV.gather(1, top_ids_BK[:, :k])
    beyond_B = prob_BV.scatter(1, top_ids_BK[:, :k], 0.0).double().sum(-1)
    # rest[n]: the mass without the n likeliest; summed from the small end.
    rest_BK = top_BK.double().flip(-1).cumsum(-1).flip(-1) + beyond_B[:, None]
    sure_B = (top_BK * k >= 1).sum(-1)
    unsure_B = torch.where(sure_B < k, rest_BK.gather(1, sure_B.clamp_max(k - 1)[:, None]).squeeze(1), 0.0)
    # A sum that rounding has lifted just above a whole number does not ask for one entry more.
    count_B = (sure_B + (unsure_B * k - 1e-4).ceil().long()).clamp(1, k)
    slots_BK = count_B[:, None] - index_K
    below_BK = (top_BK.double() * slots_BK < rest_BK) & (slots_BK > 0)
    kept_B = torch.where(below_BK.any(-1), below_BK.int().argmax(-1), count_B)
    keep_BK, used_BK = index_K < kept_B[:, None], index_K < count_B[:, None]
    draws_B = count_B - kept_B
    last = kept_B.clamp_max(k - 1)[:, None]
    weight_B = torch.where(draws_B > 0, rest_BK.gather(1, last).squeeze(1) / draws_B.clamp_min(1), 0.0)
    # Kept entries take no room on the line of the others.
    prob_BV.scatter_(1, top_ids_BK[:, :k], torch.where(keep_BK, 0.0, top_BK))
    line_BV = prob_BV.cumsum(-1, dtype=torch.float64)
    share_BK = (index_K - kept_B[:, None] + uniforms_B[:, None]) / draws_B.clamp_min(1)[:, None]
    found_BK = torch.searchsorted(line_BV, share_BK.clamp(0.0, _BELOW_ONE) * line_BV[:, -1:], right=True)
    ids_BK = torch.where(keep_BK, top_ids_BK[:, :k], found_BK.clamp_max(prob_BV.shape[1] - 1))
    weights_BK = torch.where(keep_BK, top_BK, weight_B[:, None].to(top_BK.dtype))
    return ids_BK.where(used_BK, 0), weights_BK.where(used_BK, 0.0), count_B, kept_B


def draw_replacement(
    prob_BV: torch.Tensor, top_ids_BK: torch.Tensor, k: int, uniforms_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids [B, K], weights [B, K], count [B], count [B]) by K independent draws from p, each of weight 1/K; a token drawn n
    times stands once with weight n/K (Anshumann et al. 2025, arXiv 2503.16870, with the proposal p)."""
    line_BV = prob_BV.cumsum(-1, dtype=torch.float64)
    # K independent numbers from one.
    seeds = (uniforms_B.double() * 2**53).long().cpu().numpy()
    points = [np.random.Generator(np.random.Philox(key=int(seed))).random(k) for seed in seeds]
    points_BK = torch.from_numpy(np.array(points).reshape(-1, k)).to(prob_BV.device) * line_BV[:, -1:]
    drawn_BK = torch.searchsorted(line_BV, points_BK, right=True).clamp_max(prob_BV.shape[1] - 1).sort(-1).values
    first_BK = torch.ones_like(drawn_BK, dtype=torch.bool)
    first_BK[:, 1:] = drawn_BK[:, 1:] != drawn_BK[:, :-1]
    slot_BK = first_BK.cumsum(-1) - 1
    weight_BK = torch.zeros(drawn_BK.shape, dtype=torch.float32, device=prob_BV.device)
    weight_BK.scatter_add_(1, slot_BK, torch.full_like(weight_BK, 1 / k))
    ids_BK = torch.zeros_like(drawn_BK).scatter_(1, slot_BK, drawn_BK)
    count_B = first_BK.sum(-1)
    return ids_BK, weight_BK, count_B, count_B
