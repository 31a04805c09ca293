"""A model directory as one GGUF file, which llama.cpp and what builds on it run.

The file carries tensors under GGUF's names, the settings its readers need, and the tokenizer. Only families and tokenizers
whose whole meaning the format carries are written; others are refused by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kdscale.config.sections import GgufType
from kdscale.engine.directories import stored_dtype
from kdscale.engine.gguf_tokenizer import add_tokenizer
from kdscale.errors import ConfigError, ModelError

_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_OWN_TYPES: dict[torch.dtype, GgufType] = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class _Family:
    architecture: str
    """GGUF's name."""
    interleaved: bool = False
    """Whether queries and keys turn neighbouring elements (and not the two halves of a head) against each other."""
    biased: bool = False
    """Whether queries, keys and values have biases."""


_FAMILIES = {
    "llama": _Family("llama", interleaved=True),
    "mistral": _Family("llama", interleaved=True),
    "qwen2": _Family("qwen2", biased=True),
    "qwen3": _Family("qwen3"),
}
"""By ``model_type``; each is loaded again and compared in the tests."""


def own_type(config: PretrainedConfig) -> GgufType:
    """The type that stores a model's weights as they are."""
    return _OWN_TYPES[stored_dtype(config)]


def require_gguf(config: PretrainedConfig, where: Path) -> None:
    """Raises: ModelError for a model whose meaning a GGUF file would lose; ConfigError without the package."""
    _package()
    if config.model_type not in _FAMILIES:
        raise ModelError(
            f"{where}: a model of type {config.model_type} cannot be written as GGUF; supported are {', '.join(_FAMILIES)}."
            " Its Hugging Face directory stays usable"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    windowed = config.model_type == "mistral" and config.sliding_window is not None
    unknown = {
        f"rope_type = {rope}": rope != "default",
        f"hidden_act = {config.hidden_act}": config.hidden_act != "silu",
        "attention in a sliding window": sliding or windowed,
        "attention_bias = true": getattr(config, "attention_bias", False),
        "mlp_bias = true": getattr(config, "mlp_bias", False),
    }
    for what, there in unknown.items():
        if there:
            raise ModelError(f"{where}: {what} of a {config.model_type} model cannot be written as GGUF by kdscale")


def write_gguf(model: PreTrainedModel, tokenizer: Any, path: Path, kind: GgufType, name: str) -> None:
    """Write ``model`` (whole, in host memory) with its transformers ``tokenizer``; ``name`` is what the file calls it.

    One tensor is converted at a time; vectors (norms, biases) stay in float32.

    Raises:
        ModelError: a model or tokenizer that cannot be written, or rows that do not divide into blocks of ``kind``.
    """
    gguf, config = _package(), model.config
    require_gguf(config, path)
    family = _FAMILIES[config.model_type]
    writer = gguf.GGUFWriter(path, family.architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_settings(writer, config, gguf.LlamaFileType[_FILE_TYPES[kind]])
        add_tokenizer(writer, tokenizer, config.vocab_size)
        tensors = list(_named(model, family))
        for place, parameter in tensors:
            stored = _type(gguf, place, parameter, kind)
            block, size = gguf.GGML_QUANT_SIZES[stored]
            *rows, columns = parameter.shape
            shape = [*rows, columns // block * size]
            writer.add_tensor_info(place, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for place, parameter in tensors:
            data = _arranged(place, parameter.detach().float(), config, family).numpy()
            writer.write_tensor_data(gguf.quants.quantize(data, _type(gguf, place, parameter, kind)))
    finally:
        writer.close()


def load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """What transformers makes of the file, weights in ``dtype``. Raises: ModelError."""
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        if config.model_type == "qwen3":
            # transformers does not read it, and means 128.
            field = _package().GGUFReader(path).fields["qwen3.attention.key_length"]
            config.head_dim = int(field.parts[field.data[0]][0])
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=dtype)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ModelError(f"{path} cannot be loaded again: {error}") from error
    model.config.use_cache = False
    return model.eval()


def _package() -> Any:
    """Raises: ConfigError when the package that reads and writes the format is missing."""
    try:
        import gguf
    except ImportError:
        raise ConfigError("GGUF needs the package gguf; install it with `pip install -e '.[gguf]'`") from None
    return gguf


def _add_settings(writer: Any, config: PretrainedConfig, file_type: int) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _named(model: PreTrainedModel, family: _Family) -> Iterator[tuple[str, nn.Parameter]]:
    """(GGUF's name, parameter), a tied head left out. Raises: ModelError for a parameter GGUF has no name for."""
    gguf = _package()
    (architecture,) = (one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None or (name.endswith(".bias") and not family.biased):
            raise ModelError(f"{name} of a {model.config.model_type} model has no place in a GGUF file")
        yield place, parameter


def _type(gguf: Any, place: str, parameter: nn.Parameter, kind: GgufType) -> Any:
    """What a tensor is stored as. Raises: ModelError."""
    stored = gguf.GGMLQuantizationType["F32" if parameter.dim() == 1 else kind.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[stored]
    if parameter.shape[-1] % block:
        raise ModelError(
            f"{place} has rows of {parameter.shape[-1]} elements, and {kind} stores blocks of {block}; use --type f16 or bf16"
        )
    return stored


def _arranged(place: str, weight: torch.Tensor, config: PretrainedConfig, family: _Family) -> torch.Tensor:
    """Rows of queries and keys in the order the architecture turns them."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(place.split(".")[-2])
    if heads is None or not family.interleaved:
        return weight
    # Rows of a head: first halves, second halves -> pairs.
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
