"""Which families of language models can be cut into pipeline stages, and where each keeps its parts. No weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdscale.config.sections import StudentSection
from kdscale.engine.directories import load_config, resolve_model
from kdscale.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts under ``model.base_model``, and how its layers attend."""

    attention: Literal["full", "window", "by_layer"] = "full"
    """full: causal; window: causal, sliding where ``config.sliding_window`` is set; by_layer: ``config.layer_types``."""
    embedding: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    rotary_by_kind: bool = False
    """Whether full and sliding layers turn by other frequencies."""
    places: str | None = None
    """Learned position embedding."""
    dropout: str | None = None


_FAMILIES = {
    "llama": Family(),
    "mistral": Family(attention="window"),
    "mixtral": Family(attention="window"),
    "qwen2": Family(attention="by_layer"),
    "qwen3": Family(attention="by_layer"),
    "qwen3_moe": Family(attention="window"),
    "gemma2": Family(attention="by_layer"),
    "gemma3_text": Family(attention="by_layer", rotary_by_kind=True),
    "gpt2": Family(embedding="wte", layers="h", norm="ln_f", rotary=None, places="wpe", dropout="drop"),
    "gpt_neox": Family(embedding="embed_in", norm="final_layer_norm", dropout="emb_dropout"),
}
"""By ``model_type``; each is compared with plain transformers in the tests."""


def require_pipeline_family(student: StudentSection, teacher_directory: Path) -> None:
    """Raises: ModelError for a student that cannot be cut into stages, before any weight is read."""
    model_type: str | None
    match student.init:
        case "teacher_layers":
            model_type = load_config(teacher_directory).model_type
        case "model":
            assert student.model is not None
            model_type = load_config(resolve_model(student.model)).model_type
        case "config":
            assert student.config is not None
            model_type = student.config.get("model_type")
    family_of(model_type)


def family_of(model_type: str | None) -> Family:
    if model_type not in _FAMILIES:
        raise ModelError(
            f"student.parallel.pipeline: a model of type {model_type} cannot be cut into stages; supported are"
            f" {', '.join(_FAMILIES)}. Use student.parallel.pipeline=1 with data ranks"
        )
    return _FAMILIES[model_type]
