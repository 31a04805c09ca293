"""Attention of packed rows on a processor: only pairs of tokens of one document are computed.

R = rows, L = columns, H = heads of the queries, K = heads of keys and values, G = H / K, D = width of a head; in a tile
Q queries meet C keys.

torch's kernel takes a whole [L, L] mask and computes what it hides, and its backward is several times slower than the
matrix products it consists of (SmolLM2's shape, 256 columns, bfloat16: 8.9 ms a row against 2.0). Here each tile of
queries meets the keys from the beginning of its first document (or window) on, in plain batched products; probabilities are
computed again in the backward, so that memory grows with L alone (Dao et al., arXiv 2205.14135).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, PreTrainedModel

_NAME = "kdscale_documents"
_TILE = 128
"""Queries: fewer waste less of a document's corner, more keep the products large."""
_FAMILIES = frozenset({"gemma3_text", "granite", "llama", "mistral", "mixtral", "olmo2", "qwen2", "qwen3", "qwen3_moe"})
"""Families that tell their attention the positions, and need no more than a window of it; compared in the tests."""


def attend_by_document(model: PreTrainedModel) -> None:
    """Let ``model``, on a processor, compute attention within documents alone. Another family is left as it is."""
    config = model.config
    if (
        config.model_type in _FAMILIES
        and config._attn_implementation == "sdpa"
        and not getattr(config, "attention_dropout", 0.0)
        and not getattr(config, "use_bidirectional_attention", False)
    ):
        model.set_attn_implementation(_NAME)


@contextmanager
def attend_by_kernel(model: PreTrainedModel) -> Iterator[None]:
    """Inside, ``model`` computes attention by torch's kernel, as continuations with a cache need it."""
    ours = model.config._attn_implementation == _NAME
    if ours:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if ours:
            model.set_attn_implementation(_NAME)


@dataclass(frozen=True)
class _Tile:
    """Queries [start, stop) of a row and the keys [first, stop) that any of them sees."""

    row: int
    start: int
    stop: int
    first: int
    hidden_QC: torch.Tensor
    """-inf where a query does not see a key, else 0."""


_PLANS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""positions -> kind -> tiles: all layers share them."""


def _plan(positions_RL: torch.Tensor, rows: int, window: int | None, dtype: torch.dtype) -> list[_Tile]:
    """Tiles of all ``rows``; positions of one row stand for all, as transformers makes them where it is given none."""
    plans, kind = _PLANS.setdefault(positions_RL, {}), (rows, window, dtype)
    if kind not in plans:
        plans[kind] = [
            tile
            for row, positions_L in enumerate(np.broadcast_to(positions_RL.numpy(), (rows, positions_RL.shape[1])))
            for tile in _tiles(row, positions_L, window, dtype)
        ]
    return plans[kind]


def _tiles(row: int, positions_L: np.ndarray, window: int | None, dtype: torch.dtype) -> list[_Tile]:
    columns = np.arange(len(positions_L))
    # As transformers reads it: a document ends where the next position is no successor.
    begins = np.concatenate([[True], np.diff(positions_L) != 1])
    first_L = np.maximum.accumulate(np.where(begins, columns, 0))
    if window is not None:
        first_L = np.maximum(first_L, columns - window + 1)
    tiles = []
    for start in range(0, len(columns), _TILE):
        stop = min(start + _TILE, len(columns))
        first = int(first_L[start])
        keys = columns[first:stop]
        seen_QC = (keys >= first_L[start:stop, None]) & (keys <= columns[start:stop, None])
        hidden_QC = torch.zeros(seen_QC.shape, dtype=dtype).masked_fill_(~torch.from_numpy(seen_QC), -torch.inf)
        tiles.append(_Tile(row, start, stop, first, hidden_QC))
    return tiles


class _Attention(torch.autograd.Function):
    """softmax(scale * q k^T) v by tiles. Saves its inputs."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: list[_Tile], scale: float
    ) -> torch.Tensor:
        """q [R, H, L, D], k and v [R, K, L, D] -> [R, L, H, D]."""
        ctx.save_for_backward(q, k, v)
        ctx.tiles, ctx.scale = tiles, scale
        rows, heads, columns, _ = q.shape
        out = q.new_empty(rows, columns, heads, v.shape[3])
        for tile in tiles:
            queries, keys = slice(tile.start, tile.stop), slice(tile.first, tile.stop)
            p = _probabilities(q[tile.row, :, queries], k[tile.row, :, keys], tile, scale)
            o = torch.bmm(p, v[tile.row, :, keys])
            out[tile.row, queries] = o.view(heads, -1, o.shape[2]).transpose(0, 1)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        (d_out,) = grads
        groups = k.shape[1]
        dq = torch.empty_like(q)
        # Each product is rounded once; their sum over the tiles is not rounded on the way.
        dk, dv = (torch.zeros(one.shape, dtype=torch.float32) for one in (k, v))
        for tile in ctx.tiles:
            row, queries, keys = tile.row, slice(tile.start, tile.stop), slice(tile.first, tile.stop)
            q_t, k_t, v_t = q[row, :, queries], k[row, :, keys], v[row, :, keys]
            p = _probabilities(q_t, k_t, tile, ctx.scale)
            d_o = d_out[row, queries].transpose(0, 1).reshape(groups, -1, v.shape[3])
            dv[row, :, keys] += torch.bmm(p.transpose(1, 2), d_o)
            ds = torch._softmax_backward_data(torch.bmm(d_o, v_t.transpose(1, 2)), p, -1, p.dtype)
            dq[row, :, queries] = torch.bmm(ds, k_t).view(q_t.shape)
            dk[row, :, keys] += torch.bmm(ds.transpose(1, 2), q_t.reshape(groups, -1, q.shape[3]))
        dq *= ctx.scale
        dk *= ctx.scale
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _probabilities(q_HQD: torch.Tensor, k_KCD: torch.Tensor, tile: _Tile, scale: float) -> torch.Tensor:
    """[K, G * Q, C]: the queries that share a head of keys lie one after the other."""
    groups = k_KCD.shape[0]
    q = q_HQD.reshape(groups, -1, q_HQD.shape[2])
    hidden = tile.hidden_QC.expand(q_HQD.shape[0] // groups, -1, -1).reshape(q.shape[1], -1)
    return torch.softmax(torch.baddbmm(hidden, q, k_KCD.transpose(1, 2), alpha=scale), -1)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    position_ids: torch.Tensor,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in place of its own attention."""
    tiles = _plan(position_ids, query.shape[0], sliding_window, query.dtype)
    return _Attention.apply(query, key, value, tiles, scaling), None


AttentionInterface.register(_NAME, _attend)
