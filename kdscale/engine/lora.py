"""Low-rank adapters (LoRA, arXiv 2106.09685) on a student's linear layers: put in, and merged into plain weights again.

A layer ``W`` becomes ``W + scale * B A`` with ``A`` [rank, in] drawn and ``B`` [out, rank] zero: the student starts as its
base. The base is frozen, so it is in no optimizer and in no checkpoint.
"""

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kdscale.config.sections import LoraSection
from kdscale.errors import ModelError

_NAME = "default"
_BASE, _A, _B = ".base_layer.", f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"


def add_adapters(model: PreTrainedModel, lora: LoraSection, dtype: torch.dtype) -> None:
    """Put adapters on the layers that ``lora.targets`` find and freeze everything else but what ``lora.whole`` finds.

    Raises:
        ModelError: a pattern that finds nothing, or the head, whose weight the loss takes as it is.
    """
    # Only who needs it waits for its import.
    from peft import LoraConfig, inject_adapter_in_model

    names = _targets(model, lora.targets)
    given = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # it only divides
        lora_dropout=lora.dropout,
        target_modules=names,
        # GPT-2 keeps its matrices the other way round.
        fan_in_fan_out=isinstance(model.get_submodule(names[0]), Conv1D),
    )
    inject_adapter_in_model(given, model, _NAME)
    for name, parameter in model.named_parameters():
        if name.endswith((_A, _B)):
            parameter.data = parameter.data.to(dtype)
    for pattern in lora.whole:
        found = [one for name, one in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise ModelError(f"student.lora.whole: {pattern!r} finds no parameter of {type(model).__name__}")
        for parameter in found:
            parameter.requires_grad_(True)


def _targets(model: PreTrainedModel, patterns: list[str]) -> list[str]:
    """Names of the linear layers that the patterns find. Raises: ModelError."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    found: list[str] = []
    for pattern in patterns:
        here = [name for name in linear if re.search(pattern, name)]
        if not here:
            raise ModelError(f"student.lora.targets: {pattern!r} finds no linear layer of {type(model).__name__}")
        found += [name for name in here if name not in found]
    for name in found:
        if linear[name] is model.get_output_embeddings():
            raise ModelError(
                f"student.lora.targets finds {name}, the head, which takes no adapter; train it whole by student.lora.whole, or"
                " leave it as it is"
            )
    return found


@torch.no_grad()
def merged(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state`` (whole parameters by ``model``'s names) as a plain model's: adapters added to their layers in float32, each
    layer in its dtype and under its own name. Without adapters, ``state`` itself."""
    layers = [name.removesuffix(_A) for name in state if name.endswith(_A)]
    if not layers:
        return state
    plain = {name.replace(_BASE, "."): value for name, value in state.items() if not name.endswith((_A, _B))}
    for name in layers:
        layer: Any = model.get_submodule(name)
        change = state[name + _B].float() @ state[name + _A].float() * layer.scaling[_NAME]
        weight = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = (weight.float() + (change.T if layer.fan_in_fan_out else change)).to(weight.dtype)
    return plain
