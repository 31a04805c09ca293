"""A language model's head, detached from its model: hidden states in, float32 logits out.

T = positions, V = true vocabulary, D = hidden size.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HeadSpec:
    """What turns ``hidden @ weight.T + bias`` into logits: ``softcap * tanh(scale * (...) / softcap)``."""

    vocab_size: int
    """True vocabulary: the tokenizer's largest id + 1. A model's embedding may be padded beyond it; rows past it are
    phantoms that take no part in any distribution."""
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Head:
    """Head weights (``weight_VD`` may have phantom rows) with their spec."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    spec: HeadSpec

    def to(self, device: torch.device) -> "Head":
        bias = None if self.bias_V is None else self.bias_V.to(device)
        return Head(self.weight_VD.to(device), bias, self.spec)

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Float32 logits [T, V] over the true vocabulary; the product runs in the weight's dtype."""
        return head_logits(hidden_TD, self.weight_VD, self.bias_V, self.spec)


def head_logits(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, spec: HeadSpec
) -> torch.Tensor:
    """Float32 logits [T, V] over the true vocabulary of ``spec``."""
    weight_VD = weight_VD[: spec.vocab_size]
    product_TV = (hidden_TD.to(weight_VD.dtype) @ weight_VD.T).float()
    return finish_logits(product_TV, bias_V, spec)


def finish_logits(product_TV: torch.Tensor, bias_V: torch.Tensor | None, spec: HeadSpec) -> torch.Tensor:
    """Bias, scale and softcap, in place, on ``hidden @ weight.T`` in float32."""
    if bias_V is not None:
        product_TV += bias_V[: spec.vocab_size]
    if spec.scale != 1.0:
        product_TV *= spec.scale
    if spec.softcap is not None:
        product_TV.div_(spec.softcap).tanh_().mul_(spec.softcap)
    return product_TV


def chunk_rows(vocab_size: int, chunk_bytes: int, item_bytes: int = 4) -> int:
    """Rows of a [rows, vocab_size] tile that fit into ``chunk_bytes``; at least 1."""
    return max(1, chunk_bytes // (item_bytes * vocab_size))
