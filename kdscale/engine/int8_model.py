"""A model directory whose linear layers compute in int8: each weight's rows have a scale of their own, fixed when the files are
written, and each token's activations one that is found while the model runs.

torchao does both, and transformers loads the directory by what stands in its ``config.json``.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.import_utils import is_torchao_available

from kdscale.engine.directories import beside_weights, stored_dtype
from kdscale.errors import ConfigError, ModelError

_FAMILIES = frozenset({"gemma2", "gemma3_text", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"})
"""By ``model_type``; each is loaded again and compared in the tests. GPT-2's layers and the experts of mixtures are no
``nn.Linear``, and would be left as they are without a word."""


def require_int8(config: PretrainedConfig, where: Path) -> None:
    """Raises: ModelError for a family that is not on the list; ConfigError without torchao."""
    if not is_torchao_available():
        raise ConfigError("int8 needs the package torchao; install it with `pip install -e '.[int8]'`")
    if config.model_type not in _FAMILIES:
        raise ModelError(
            f"{where}: a model of type {config.model_type} cannot be written as int8; supported are"
            f" {', '.join(sorted(_FAMILIES))}. Its Hugging Face directory stays usable"
        )


def write_int8(source: Path, directory: Path, shard_bytes: int) -> None:
    """Write the model in ``source`` into ``directory``: int8 weights (symmetric, a scale for each output channel) in
    safetensors of at most ``shard_bytes`` each, what is not int8 in the model's own dtype, and beside them what else lies in
    ``source`` to read inputs by.

    Embedding and head stay as they are. A tied head would have to be untied and stored once more, for an embedding is looked
    up and not multiplied; and no layer comes after a head in which its rounding could average out.

    Raises:
        ConfigError: torchao is missing.
        ModelError: a family that is not on the list, or weights that cannot be read.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import AutoConfig, TorchAoConfig

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    require_int8(config, source)
    with torch.device("meta"):
        heads = _head_names(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    # Inductor's settings are the whole process's: whoever compiles the model chooses them.
    scheme = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    model = _load(source, stored_dtype(config), TorchAoConfig(scheme, modules_to_not_convert=heads))
    model.save_pretrained(directory, max_shard_size=shard_bytes)
    for path in beside_weights(source):
        if not (directory / path.name).exists():
            shutil.copyfile(path, directory / path.name)


def load_int8(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """What transformers makes of ``write_int8``'s directory; what is not int8 is in ``dtype``.

    Raises:
        ModelError: it cannot be loaded, or a linear layer besides the head has other weights than int8.
    """
    model = _load(directory, dtype, None)
    heads = _head_names(model)
    plain = [name for name, one in _linears(model) if name not in heads and not _is_int8(one.weight)]
    if plain:
        raise ModelError(f"{directory}: {len(plain)} linear layers are not int8 when it is loaded again: {plain[:3]}")
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.eval()


def _load(directory: Path, dtype: torch.dtype, quantization: Any) -> PreTrainedModel:
    """Raises: ModelError."""
    fields = {} if quantization is None else {"quantization_config": quantization}
    try:
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, **fields
        )
    except (ValueError, KeyError, OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{directory} cannot be loaded with int8 weights: {error}") from error


def _linears(model: PreTrainedModel) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _head_names(model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if module is head]


def _is_int8(weight: torch.Tensor) -> bool:
    """torchao's weight keeps the look of the dtype it was made of; the numbers lie in ``qdata``."""
    data = getattr(weight, "qdata", None)
    return isinstance(data, torch.Tensor) and data.dtype == torch.int8
