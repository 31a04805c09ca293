"""Classifiers of texts and images: pooled output in, logits of the classes out, as with any head.

R = rows, L = tokens or pixels in a row, D = hidden size of the head's input.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from kdscale.batch import ExampleBatch
from kdscale.config.sections import StudentSection
from kdscale.data.images import Pixels
from kdscale.errors import IdentityError, ModelError
from kdscale.head import HeadSpec
from kdscale.spec import Task

AUTO: dict[Task, Any] = {
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}
_HEADS = {
    "sequence-classification": dict.fromkeys(("bert", "distilbert"), "classifier")
    | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gpt2"), "score"),
    "image-classification": {"vit": "classifier"},
}
"""By task and ``model_type``: the last linear layer, which makes logits of what the model has pooled. Each family is
compared with plain transformers in the tests."""


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


def require_family(task: Task, config: PretrainedConfig, name: str) -> None:
    """Raises: ModelError for a family whose head is not known."""
    if config.model_type not in _HEADS[task]:
        raise ModelError(
            f"{name}: a model of type {config.model_type} is not supported for task {task}; supported are"
            f" {', '.join(_HEADS[task])}"
        )
    if task == "sequence-classification" and config.get_text_config().pad_token_id is None:
        raise ModelError(f"{name}: its config has no pad_token_id, by which it would know where a text ends; set one")


def class_head(model: PreTrainedModel) -> nn.Module:
    return model.get_submodule(_head_name(model))


def set_class_head(model: PreTrainedModel, head: nn.Module) -> None:
    model.set_submodule(_head_name(model), head)


def _head_name(model: PreTrainedModel) -> str:
    task = "image" if type(model).__name__.endswith("ForImageClassification") else "sequence"
    return _HEADS[f"{task}-classification"][model.config.model_type]


def class_spec(num_classes: int) -> HeadSpec:
    """Softcap and scale of a family are its language model's, not its classifier's."""
    return HeadSpec(num_classes)


def num_classes(config: PretrainedConfig) -> int:
    return len(class_names(config))


def head_width(config: PretrainedConfig) -> int:
    """Numbers that a family's head is given, D."""
    width: int = config.get_text_config().hidden_size
    return width


def class_names(config: PretrainedConfig) -> tuple[str, ...]:
    """The classes' names in the order of their numbers."""
    # On disk they stand in the order of their numbers' spellings: 0, 1, 10, 2.
    names = {int(number): name for number, name in (config.id2label or {}).items()}
    return tuple(names[number] for number in sorted(names))


def student_config(
    student: StudentSection, own: PretrainedConfig | None, teacher: PretrainedConfig
) -> PretrainedConfig:
    """The student's config (``own``, or fresh from ``student.config``): of the teacher's classes and inputs.

    Raises:
        ModelError: other classes, or images of another size.
        IdentityError: the classes stand in another order.
    """
    names = class_names(teacher)
    if own is None:
        assert student.config is not None
        fields = dict(student.config)
        given = fields.pop("num_labels", len(names))
        if given != len(names):
            raise ModelError(
                f"student.config.num_labels = {given}, and the teacher has {len(names)} classes; remove it"
            )
        if "model_type" not in fields:
            raise ModelError("student.config has no model_type; name a transformers family, for instance vit")
        inherited: dict[str, Any] = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: n for n, name in enumerate(names)},
        }
        for name in ("image_size", "num_channels", "vocab_size", "pad_token_id"):
            if hasattr(teacher, name):
                inherited[name] = getattr(teacher, name)
        try:
            own = AutoConfig.for_model(**(inherited | fields))
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"student.config is not usable: {error}") from error
    if num_classes(own) != len(names):
        raise ModelError(
            f"the student tells {num_classes(own)} classes apart, the teacher {len(names)}: soft targets are about the"
            " teacher's; give the student a head of as many (or use student.init: config)"
        )
    for number, (ours, theirs) in enumerate(zip(class_names(own), names, strict=True)):
        if ours != theirs and f"LABEL_{number}" not in (ours, theirs):
            raise IdentityError(
                f"class {number} is {theirs!r} to the teacher and {ours!r} to the student; give both one order (id2label in"
                " config.json)"
            )
    for name in ("image_size", "num_channels"):
        ours, theirs = (_plain(getattr(one, name, None)) for one in (own, teacher))
        if ours != theirs:
            raise ModelError(f"the student has {name} = {ours}, the teacher {theirs}; both read the same pixels")
    return own


def _plain(size: Any) -> Any:
    return [size, size] if isinstance(size, int) else size and list(size)


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


def pixels_of(directory: Path, task: Task) -> Pixels | None:
    """How the model in ``directory`` reads images; none reads text. Raises: ModelError."""
    return Pixels.load(directory) if task == "image-classification" else None
