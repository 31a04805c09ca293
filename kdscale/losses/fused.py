"""Head and loss by chunks of rows: value and both gradients without any [T, V] array.

T = positions trained on, C = positions of a chunk, B = positions of a block, V = true vocabulary, D = hidden size.

One tile [C, V] in the weight's dtype goes through all stages in place: logits -> gradient -> the two products. Chunks are
large enough that the products run at full speed; the elementwise work in between goes through each chunk in float32, by blocks
small enough for the cache. The gradients are computed in the forward pass, when the logits are there anyway; backward only
multiplies them.
"""

from typing import Any

import torch

from kdscale.batch import HiddenTargets, SoftTargets
from kdscale.errors import ConfigError
from kdscale.head import Head, HeadSpec, chunk_rows, finish_logits
from kdscale.losses.blocks import STATS, block_gradient
from kdscale.losses.objective import Objective

__all__ = ["STATS", "fused_loss"]
_BLOCK_BYTES = 2 << 20
"""On processors: a block and its temporaries stay in the second-level caches of the cores that share it."""
_CPU_CHUNK_ROWS = {1: (128, 192), 2: (112, 224)}
"""On processors, by the tiles of a chunk: rows of float32 and of narrower numbers beyond which the products gain little."""
_ROUNDED_SUMS = 16
"""A narrow weight's gradient is summed in its own dtype over so many chunks at most: each rounds once, which adds up to less
than the products' own rounding. Over more it is summed in float32."""


def fused_loss(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    spec: HeadSpec,
    labels_T: torch.Tensor,
    targets: SoftTargets | None,
    objective: Objective,
    *,
    chunk_bytes: int,
    teacher_head: Head | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the objective over the positions, float32; statistics ``STATS``, float32, detached).

    Differentiable with respect to hidden states, weight and bias. Products run in the weight's dtype, reductions in
    float32. Without targets the objective is the hard loss alone, whatever ``objective.hard_weight`` says of soft targets.
    The weight may have phantom rows beyond ``spec.vocab_size``: they take part in nothing and get gradient 0. The weight
    itself is not kept for backward (ZeRO-3 takes it away after the forward).

    Raises:
        ConfigError: hidden targets without the teacher's head, or a head of another vocabulary.
    """
    if isinstance(targets, HiddenTargets) and (teacher_head is None or teacher_head.spec.vocab_size != spec.vocab_size):
        held = "no teacher head" if teacher_head is None else f"a teacher head of {teacher_head.spec.vocab_size} tokens"
        raise ConfigError(f"hidden targets need the teacher's head over {spec.vocab_size} tokens; there is {held}")
    loss, stats = _FusedLoss.apply(
        hidden_TD, weight_VD, bias_V, labels_T, targets, teacher_head, spec, objective, chunk_bytes
    )
    return loss, stats


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels_T: torch.Tensor,
        targets: SoftTargets | None,
        teacher_head: Head | None,
        spec: HeadSpec,
        objective: Objective,
        chunk_bytes: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        device, weight_VD, count = hidden_TD.device, weight[: spec.vocab_size], len(hidden_TD)
        both = isinstance(targets, HiddenTargets)
        rows = _rows(count, weight, spec.vocab_size, chunk_bytes, tiles=2 if both else 1)
        sums = torch.zeros(len(STATS), dtype=torch.float64, device=device)
        grad_hidden = torch.empty_like(hidden_TD) if need_hidden else None
        sum_dtype = weight.dtype if count <= _ROUNDED_SUMS * rows else torch.float32
        grad_weight = torch.empty(weight.shape, dtype=sum_dtype, device=device) if need_weight else None
        grad_bias = None
        if need_bias and bias is not None:
            grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=device)
        tile = torch.empty(rows, spec.vocab_size, dtype=weight.dtype, device=device)
        teacher_tile = torch.empty_like(tile) if both else None
        theirs_VD = None
        if both:
            assert teacher_head is not None
            theirs_VD = teacher_head.weight_VD[: spec.vocab_size].to(weight.dtype)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            hidden_CD = hidden_TD[part].to(weight.dtype)
            tile_CV = _product(hidden_CD, weight_VD, tile)
            teacher_CV = None
            if isinstance(targets, HiddenTargets):
                assert theirs_VD is not None
                assert teacher_tile is not None
                teacher_CV = _product(targets.hidden_TD[part].to(weight.dtype), theirs_VD, teacher_tile)
            cut = None if targets is None else targets.cut(part)
            sums += _elementwise(
                tile_CV, bias, spec, labels_T[part], cut, teacher_CV, teacher_head, objective, grad_bias
            )
            if grad_hidden is not None:
                grad_hidden[part] = tile_CV @ weight_VD
            if grad_weight is not None:
                _accumulate(grad_weight[: spec.vocab_size], tile_CV, hidden_CD, first=start == 0)
        if grad_weight is not None:
            # Phantom rows; and all of them where there was no chunk.
            grad_weight[spec.vocab_size if count else 0 :].zero_()
        ctx.grads = [
            None if grad is None or of is None else grad.to(of.dtype)
            for grad, of in ((grad_hidden, hidden_TD), (grad_weight, weight), (grad_bias, bias))
        ]
        loss, stats = _combine(sums, objective, soft=targets is not None).float(), sums.float()
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        # In place, and therefore once: a second backward through the same graph finds nothing and fails.
        grads, ctx.grads = ctx.grads, None
        # Not brought to their dtype first: a factor of eight bits would tilt all of a narrow gradient alike. (On GPUs torch does
        # it all the same, and reading the factor would wait for the device.)
        return (*(None if grad is None else grad.mul_(grad_loss) for grad in grads), *[None] * 6)


def _combine(sums: torch.Tensor, objective: Objective, *, soft: bool) -> torch.Tensor:
    values = dict(zip(STATS, sums, strict=True))
    if not soft:
        return values["hard"]
    return objective.soft_factor * values["soft"] + objective.hard_weight * values["hard"]


def _rows(count: int, weight: torch.Tensor, vocab_size: int, chunk_bytes: int, *, tiles: int) -> int:
    """Rows of each of as few even chunks as the budget for ``tiles`` allows."""
    size = weight.element_size()
    most = chunk_rows(vocab_size, chunk_bytes // tiles, size)
    if weight.device.type == "cpu":
        enough = -(-count // _ROUNDED_SUMS)
        # Somewhat longer chunks are far smaller than the float32 sum that one chunk too many would need.
        least = enough if size < 4 and enough <= most else 0
        most = max(min(most, _CPU_CHUNK_ROWS[tiles][size < 4]), least)
    return -(-count // -(-count // most)) if count else 1


def _product(hidden_CD: torch.Tensor, weight_VD: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """``hidden @ weight.T``, in the tile."""
    return torch.mm(hidden_CD, weight_VD.T, out=tile[: len(hidden_CD)])


def _accumulate(grad_VD: torch.Tensor, tile_CV: torch.Tensor, hidden_CD: torch.Tensor, *, first: bool) -> None:
    """Add ``tile.T @ hidden``; the first one overwrites."""
    if grad_VD.dtype == tile_CV.dtype:
        torch.addmm(grad_VD, tile_CV.T, hidden_CD, beta=0.0 if first else 1.0, out=grad_VD)
    elif first:
        grad_VD.copy_(tile_CV.T @ hidden_CD)
    else:
        grad_VD += tile_CV.T @ hidden_CD


def _elementwise(
    tile_CV: torch.Tensor,
    bias: torch.Tensor | None,
    spec: HeadSpec,
    labels_C: torch.Tensor,
    targets: SoftTargets | None,
    teacher_CV: torch.Tensor | None,
    teacher_head: Head | None,
    objective: Objective,
    grad_bias: torch.Tensor | None,
) -> torch.Tensor:
    """Turn a chunk's products into the gradient with respect to them; returns the statistics' sums, float64."""
    count, vocab_size = tile_CV.shape
    rows = chunk_rows(vocab_size, _BLOCK_BYTES) if tile_CV.device.type == "cpu" else max(1, count)
    stats_CS = torch.zeros(count, len(STATS), dtype=torch.float32, device=tile_CV.device)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        # In float32 a block is the tile's own memory, else a copy that goes back below.
        block_BV = finish_logits(tile_CV[part].float(), bias, spec)
        slope_BV = 1 - (block_BV / spec.softcap).square_() if spec.softcap is not None else None
        teacher_BV = None
        if teacher_CV is not None and teacher_head is not None:
            teacher_BV = finish_logits(teacher_CV[part].float(), teacher_head.bias_V, teacher_head.spec)
        cut = None if targets is None else targets.cut(part)
        block_gradient(block_BV, labels_C[part], cut, teacher_BV, objective, stats_CS[part])
        if slope_BV is not None:
            block_BV *= slope_BV
        if spec.scale != 1.0:
            block_BV *= spec.scale
        if grad_bias is not None:
            grad_bias[:vocab_size] += block_BV.sum(0)
        if tile_CV.dtype != torch.float32:
            tile_CV[part] = block_BV
    return stats_CS.double().sum(0)
