"""Models by their config files alone: what a teacher is and what a student will be, before any weight is read.

Nothing here imports transformers' models: a driver, which runs none, starts in three quarters of the time.
"""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from kdscale.config.layers import LayersSection
from kdscale.config.sections import StudentSection
from kdscale.data.images import Pixels
from kdscale.engine.directories import load_config, resolve_model
from kdscale.errors import ConfigError, IdentityError, ModelError
from kdscale.spec import Task

CLASS_HEADS = {
    "sequence-classification": dict.fromkeys(("bert", "distilbert"), "classifier")
    | dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gpt2"), "score"),
    "image-classification": {"vit": "classifier"},
}
"""By task and ``model_type``: the last linear layer, which makes logits of what the model has pooled. Each family is
compared with plain transformers in the tests."""


def require_family(task: Task, config: PretrainedConfig, name: str) -> None:
    """Raises: ModelError for a family whose head is not known."""
    if config.model_type not in CLASS_HEADS[task]:
        raise ModelError(
            f"{name}: a model of type {config.model_type} is not supported for task {task}; supported are"
            f" {', '.join(CLASS_HEADS[task])}"
        )
    if task == "sequence-classification" and config.get_text_config().pad_token_id is None:
        raise ModelError(f"{name}: its config has no pad_token_id, by which it would know where a text ends; set one")


def num_classes(config: PretrainedConfig) -> int:
    return len(class_names(config))


def class_names(config: PretrainedConfig) -> tuple[str, ...]:
    """The classes' names in the order of their numbers."""
    # On disk they stand in the order of their numbers' spellings: 0, 1, 10, 2.
    names = {int(number): name for number, name in (config.id2label or {}).items()}
    return tuple(names[number] for number in sorted(names))


def config_of_fields(fields: dict[str, Any]) -> PretrainedConfig:
    """A transformers config from a mapping with ``model_type``. Raises: ModelError."""
    if "model_type" not in fields:
        raise ModelError("student.config has no model_type; name a transformers family, for instance llama")
    try:
        return AutoConfig.for_model(**fields)
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"student.config is not usable: {error}") from error


def classifier_config(student: StudentSection, teacher_directory: Path, task: Task) -> PretrainedConfig:
    """What a classifying student will be, before any weight is read. Raises: ModelError, IdentityError."""
    teacher = load_config(teacher_directory)
    own = None
    match student.init:
        case "teacher_layers":
            own = teacher
        case "model":
            assert student.model is not None
            own = load_config(resolve_model(student.model))
    config = _classifier_config(student, own, teacher)
    require_family(task, config, f"student.init = {student.init}")
    return config


def _classifier_config(
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
        inherited: dict[str, Any] = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: n for n, name in enumerate(names)},
        }
        for name in ("image_size", "num_channels", "vocab_size", "pad_token_id"):
            if hasattr(teacher, name):
                inherited[name] = getattr(teacher, name)
        own = config_of_fields(inherited | fields)
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


def pixels_of(directory: Path, task: Task) -> Pixels | None:
    """How the model in ``directory`` reads images; none reads text. Raises: ModelError."""
    return Pixels.load(directory) if task == "image-classification" else None


def student_pixels(student: StudentSection, teacher_directory: Path, task: Task) -> Pixels | None:
    """How the student reads images; none where it reads text. Raises: ModelError."""
    if task != "image-classification":
        return None
    own = resolve_model(student.model) if student.init == "model" and student.model is not None else teacher_directory
    return Pixels.load(own, settings_of=teacher_directory)


def num_layers(config: PretrainedConfig) -> int:
    """The number of the last layer."""
    count: int = config.get_text_config().num_hidden_layers
    return count


def width_of(config: PretrainedConfig) -> int:
    """Numbers of a hidden state, which is also what a head is given, D."""
    width: int = config.get_text_config().hidden_size
    return width


def require_layers(layers: LayersSection, student: StudentSection, teacher_directory: Path) -> None:
    """Whether both models have the layers that are paired, from their configs, before any weight is read.

    Raises:
        ConfigError: a layer that a model does not have; or states of different widths, and no projection.
        ModelError: a student's config that is not usable.
    """
    teacher = load_config(teacher_directory)
    configs = {"student": student_config(student, teacher_directory), "teacher": teacher}
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


def student_config(student: StudentSection, teacher_directory: Path) -> PretrainedConfig:
    """What a student that is a language model will be, before any weight is read. Raises: ModelError."""
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
