"""Classifiers of texts and images: pooled output in, logits of the classes out, as with any head.

R = rows, L = tokens or pixels in a row, D = hidden size of the head's input.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from kdscale.batch import ExampleBatch
from kdscale.data.images import Pixels
from kdscale.engine.described import CLASS_HEADS
from kdscale.head import HeadSpec
from kdscale.spec import Task

AUTO: dict[Task, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}


class PassThrough(nn.Module):
    """Stands where the head was, so that the model gives what it would have been given; keeps the head's parameters."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def is_classifier(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith(("ForSequenceClassification", "ForImageClassification"))


def class_head(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(_head_name(model))


def set_class_head(model: PreTrainedModel, head: nn.Module) -> None:
    model.set_submodule(_head_name(model), head)


def _head_name(model: PreTrainedModel) -> str:
    task = "image" if type(model).__name__.endswith("ForImageClassification") else "sequence"
    return CLASS_HEADS[f"{task}-classification"][model.config.model_type]


def class_spec(num_classes: int) -> HeadSpec:
    """Softcap and scale of a family are its language model's, not its classifier's."""
    return HeadSpec(num_classes)


def pooled(
    model: PreTrainedModel, inputs_RL: torch.Tensor, lengths_R: torch.Tensor, pixels: Pixels | None
) -> torch.Tensor:
    """What the head is given, [R, D], of a model whose head passes it on."""
    output: torch.Tensor = model(**model_inputs(model, inputs_RL, lengths_R, pixels), return_dict=False)[0]
    return output


def model_inputs(
    model: PreTrainedModel, inputs_RL: torch.Tensor, lengths_R: torch.Tensor, pixels: Pixels | None
) -> dict[str, torch.Tensor]:
    """The keyword arguments of a forward: images by ``pixels``, texts (without) up to the longest."""
    if pixels is not None:
        return {"pixel_values": pixels.values(inputs_RL).to(model.dtype)}
    longest = int(lengths_R.max())
    ids_RL = inputs_RL[:, :longest].long()
    seen_RL = torch.arange(longest, device=ids_RL.device) < lengths_R[:, None]
    padding = model.config.get_text_config().pad_token_id
    return {"input_ids": ids_RL.where(seen_RL, padding), "attention_mask": seen_RL.long()}


def example_tensors(batch: ExampleBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs [R, L], lengths [R]) on ``device``."""
    return torch.from_numpy(batch.inputs_RL).to(device), torch.from_numpy(batch.lengths_R).to(device)


@torch.no_grad()
def plain_logits(
    model: PreTrainedModel, batch: ExampleBatch, pixels: Pixels | None, device: torch.device
) -> torch.Tensor:
    """Float32 logits [T, V] of an untouched model at the trained rows, as anybody gets them."""
    logits_RV = model(**model_inputs(model, *example_tensors(batch, device), pixels)).logits
    return logits_RV[torch.from_numpy(batch.trained_R).to(device)].float()
