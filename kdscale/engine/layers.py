"""Hidden states between a model's blocks, caught by hooks while it runs.

Layer 0 is what the first block is given (the embedding's output), layer i what block i puts out, counted from 1. The last one
comes before the final norm, where transformers' ``output_hidden_states`` shows it behind.

R = rows, L = columns, D = hidden size.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kdscale.config.layers import LayersSection
from kdscale.config.sections import StudentSection
from kdscale.engine.directories import load_config, resolve_model
from kdscale.engine.models import config_of_fields
from kdscale.errors import ConfigError, ModelError

PROJECTED = "loss.layers"
"""Begins the names, in a checkpoint, of parameters that are trained with a student and are no part of it."""


def num_layers(config: PretrainedConfig) -> int:
    """The number of the last layer."""
    count: int = config.get_text_config().num_hidden_layers
    return count


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


def require_layers(layers: LayersSection, student: StudentSection, teacher_directory: Path) -> None:
    """Whether both models have the layers that are paired, from their configs, before any weight is read.

    Raises:
        ConfigError: a layer that a model does not have; or states of different widths, and no projection.
        ModelError: a student's config that is not usable.
    """
    teacher = load_config(teacher_directory)
    configs = {"student": _student_config(student, teacher_directory), "teacher": teacher}
    depths = {name: num_layers(config) for name, config in configs.items()}
    for pair in layers.pairs.items():
        for (name, depth), layer in zip(depths.items(), pair, strict=True):
            if layer > depth:
                raise ConfigError(
                    f"loss.layers.pairs = {layers.pairs}: the {name} has no layer {layer}; its layers are 0 (the embedding's"
                    f" output) to {depth}"
                )
    widths = {name: width_of(config) for name, config in configs.items()}
    if layers.projection == "none" and widths["student"] != widths["teacher"]:
        raise ConfigError(
            f"loss.layers.projection = none: the student's states have {widths['student']} numbers, the teacher's"
            f" {widths['teacher']}; use loss.layers.projection: learned"
        )


def width_of(config: PretrainedConfig) -> int:
    """Numbers of a hidden state, D."""
    width: int = config.get_text_config().hidden_size
    return width


def _student_config(student: StudentSection, teacher_directory: Path) -> PretrainedConfig:
    match student.init:
        case "teacher_layers":
            assert student.layers is not None
            config = load_config(teacher_directory)
            config.get_text_config().num_hidden_layers = len(student.layers)
            return config
        case "model":
            assert student.model is not None
            return load_config(resolve_model(student.model))
        case "config":
            assert student.config is not None
            return config_of_fields(student.config)
