"""Head and loss by chunks of rows: value and both gradients without any [T, V] array.

T = positions trained on, C = positions of a chunk, B = positions of a block, V = true vocabulary, D = hidden size.

One float32 tile [C, V] goes through all stages in place: logits -> gradient -> the two products. Chunks are large, so that
the products run at full speed; the elementwise work in between goes through each chunk by blocks small enough for the
cache. The gradients are computed in the forward pass, when the logits are there anyway; backward only multiplies them.
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
        need_bias = need_bias and bias is not None
        device, weight_VD = hidden_TD.device, weight[: spec.vocab_size]
        sums = torch.zeros(len(STATS), dtype=torch.float64, device=device)
        grad_hidden = torch.empty_like(hidden_TD) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=device) if need_weight else None
        grad_bias = (
            torch.zeros(bias.shape, dtype=torch.float32, device=device) if need_bias and bias is not None else None
        )
        both = isinstance(targets, HiddenTargets)
        rows = min(chunk_rows(spec.vocab_size, chunk_bytes // (2 if both else 1)), max(1, len(hidden_TD)))
        tile = torch.empty(rows, spec.vocab_size, dtype=torch.float32, device=device)
        teacher_tile = torch.empty_like(tile) if both else None
        for start in range(0, len(hidden_TD), rows):
            part = slice(start, start + rows)
            hidden_CD = hidden_TD[part].to(weight.dtype)
            tile_CV = _product(hidden_CD, weight_VD, tile)
            teacher_CV = None
            if isinstance(targets, HiddenTargets):
                assert teacher_head is not None
                assert teacher_tile is not None
                theirs = targets.hidden_TD[part].to(teacher_head.weight_VD.dtype)
                teacher_CV = _product(theirs, teacher_head.weight_VD[: spec.vocab_size], teacher_tile)
            sums += _elementwise(
                tile_CV,
                bias,
                spec,
                labels_T[part],
                None if targets is None else targets.cut(part),
                teacher_CV,
                teacher_head,
                objective,
            )
            low_CV = tile_CV.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = low_CV @ weight_VD
            if grad_weight is not None:
                _accumulate(grad_weight[: spec.vocab_size], low_CV, hidden_CD)
            if grad_bias is not None:
                grad_bias[: spec.vocab_size] += tile_CV.sum(0)
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
        return (*(None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in grads), *[None] * 6)


def _combine(sums: torch.Tensor, objective: Objective, *, soft: bool) -> torch.Tensor:
    values = dict(zip(STATS, sums, strict=True))
    if not soft:
        return values["hard"]
    return objective.soft_factor * values["soft"] + objective.hard_weight * values["hard"]


def _product(hidden_CD: torch.Tensor, weight_VD: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    """``hidden @ weight.T`` in float32, in the tile."""
    tile_CV = tile[: len(hidden_CD)]
    if weight_VD.dtype == torch.float32:
        torch.mm(hidden_CD, weight_VD.T, out=tile_CV)
    else:
        tile_CV.copy_(hidden_CD @ weight_VD.T)
    return tile_CV


def _accumulate(grad_VD: torch.Tensor, low_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """Add ``low.T @ hidden``; chunks add up in float32 whatever the product's dtype."""
    if low_CV.dtype == torch.float32:
        grad_VD.addmm_(low_CV.T, hidden_CD)
    else:
        grad_VD += low_CV.T @ hidden_CD


def _elementwise(
    tile_CV: torch.Tensor,
    bias: torch.Tensor | None,
    spec: HeadSpec,
    labels_C: torch.Tensor,
    targets: SoftTargets | None,
    teacher_CV: torch.Tensor | None,
    teacher_head: Head | None,
    objective: Objective,
) -> torch.Tensor:
    """Turn a chunk's products into the gradient with respect to them; returns the statistics' sums, float64."""
    count, vocab_size = tile_CV.shape
    rows = chunk_rows(vocab_size, _BLOCK_BYTES) if tile_CV.device.type == "cpu" else max(1, count)
    stats_CS = torch.zeros(count, len(STATS), dtype=torch.float32, device=tile_CV.device)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        block_BV = finish_logits(tile_CV[part], bias, spec)
        slope_BV = 1 - (block_BV / spec.softcap).square_() if spec.softcap is not None else None
        teacher_BV = None
        if teacher_CV is not None and teacher_head is not None:
            teacher_BV = finish_logits(teacher_CV[part], teacher_head.bias_V, teacher_head.spec)
        cut = None if targets is None else targets.cut(part)
        block_gradient(block_BV, labels_C[part], cut, teacher_BV, objective, stats_CS[part])
        if slope_BV is not None:
            block_BV *= slope_BV
        if spec.scale != 1.0:
            block_BV *= spec.scale
    return stats_CS.double().sum(0)
