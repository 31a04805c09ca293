"""Hidden states between a model's blocks, caught by hooks while it runs.

Layer 0 is what the first block is given (the embedding's output), layer i what block i puts out, counted from 1. The last one
comes before the final norm, where transformers' ``output_hidden_states`` shows it behind.

R = rows, L = columns, D = hidden size.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kdscale.engine.described import num_layers
from kdscale.errors import ModelError

PROJECTED = "loss.layers"
"""Begins the names, in a checkpoint, of parameters that are trained with a student and are no part of it."""


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of the language model, in order.

    Raises:
        ModelError: no list of as many modules as the config counts, or several.
    """
    wanted = num_layers(model.config)
    lists = [
        (name.count("."), module)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    outermost = min((depth for depth, _ in lists), default=0)
    found = [module for depth, module in lists if depth == outermost]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(found)} lists of {wanted} blocks, one was looked for; its layers cannot be learned"
            " from (remove loss.layers)"
        )
    return found[0]


@contextmanager
def caught_layers(model: PreTrainedModel, layers: Iterable[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Inside, a forward of ``model`` leaves the states [R, L, D] of ``layers`` in what this yields, with their gradients.

    Backward belongs outside: where activations are recomputed, blocks run again in it.
    """
    caught: dict[int, torch.Tensor] = {}
    wanted = set(layers)
    if not wanted:
        yield caught
        return
    blocks = blocks_of(model)

    def enter(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught[0] = inputs[0] if inputs else named["hidden_states"]

    def leave(layer: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            caught[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)] if 0 in wanted else []
    handles += [blocks[layer - 1].register_forward_hook(leave(layer)) for layer in wanted - {0}]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
