"""Language models and classifiers: found, loaded, cut from a teacher's layers, and taken apart into base and head."""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from kdscale.config.sections import StudentSection
from kdscale.data.images import Pixels
from kdscale.data.pairs import TokenizerPair
from kdscale.engine import classifiers
from kdscale.engine.attention import attend_by_document
from kdscale.engine.described import classifier_config, config_of_fields, require_family
from kdscale.engine.directories import load_config, require_unquantised, resolve_model, weight_files
from kdscale.engine.lora import add_adapters
from kdscale.engine.respell import respell
from kdscale.errors import ModelError
from kdscale.head import HeadSpec, head_logits
from kdscale.spec import Task

# A rank's log is no terminal.
disable_progress_bar()

_LAYER = re.compile(r"(\.(?:layers|layer|h|blocks)\.)(\d+)(?=\.)")


_AUTO: dict[Task, Any] = {"language-modelling": AutoModelForCausalLM, **classifiers.AUTO}


def load_causal_lm(directory: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """A pretrained language model from safetensors. Raises: ModelError."""
    return load_model(directory, dtype, "language-modelling")


def load_model(directory: str | Path, dtype: torch.dtype, task: Task) -> PreTrainedModel:
    """A pretrained model from safetensors. Raises: ModelError."""
    if task != "language-modelling":
        require_family(task, load_config(directory), str(directory))
    try:
        model, info = _AUTO[task].from_pretrained(
            directory, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (ValueError, KeyError, TypeError, OSError, SafetensorError, StrictDataclassError) as error:
        raise ModelError(f"{directory} cannot be loaded for {task}: {error}") from error
    except RuntimeError as error:
        # Of others, of ranks that load together for instance, it is not the directory's fault.
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ModelError(f"{directory}: the weights have other sizes than config.json says") from error
    if info["missing_keys"]:
        # transformers would draw a head at random, and go on.
        what, way_out = ("classifier", "fine-tune it first")
        if task == "language-modelling":
            what, way_out = "language model", "name one that has all its weights"
        raise ModelError(f"{directory} holds no {what}: {sorted(info['missing_keys'])[:3]} are missing; {way_out}")
    _without_cache(model)
    return model


def _without_cache(model: PreTrainedModel) -> None:
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False


def build_student(
    student: StudentSection,
    teacher_directory: Path,
    dtype: torch.dtype,
    task: Task = "language-modelling",
    pair: TokenizerPair | None = None,
) -> PreTrainedModel:
    """The student, whole and in host memory; sharding comes later, from outside.

    Fresh weights are drawn plainly (``zero.Init`` with transformers 5 draws others), so the caller's seed decides them. ``pair``:
    the tokenizers, where the student has one of its own.
    """
    config = None if task == "language-modelling" else classifier_config(student, teacher_directory, task)
    match student.init:
        case "teacher_layers":
            assert student.layers is not None
            model = from_teacher_layers(teacher_directory, student.layers, dtype, task)
            if pair is not None:
                respell(model, pair)
        case "model":
            assert student.model is not None
            directory = resolve_model(student.model)
            require_unquantised(load_config(directory), directory)
            model = load_model(directory, dtype, task)
        case "config" if config is not None:
            model = _AUTO[task].from_config(config, dtype=dtype)
        case "config":
            assert student.config is not None
            model = from_fields(student.config, dtype)
    _without_cache(model)
    if not student.gpus_per_rank and config is None:
        attend_by_document(model)
    if student.lora is not None:
        add_adapters(model, student.lora, dtype)
    freeze(model, student.freeze)
    if config is None:
        require_known_head(model)
    return model


def from_fields(fields: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """A fresh model of ``config_of_fields``. Raises: ModelError."""
    config = config_of_fields(fields)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"student.config is not a causal language model's: {error}") from error


def from_teacher_layers(
    directory: Path, layers: list[int], dtype: torch.dtype, task: Task = "language-modelling"
) -> PreTrainedModel:
    """A model of the teacher's chosen layers, embeddings and head.

    Only the tensors it needs are read, where they lie on disk by the names of the model's own; else (experts one by one, GPT-2
    without its prefix) transformers loads the whole teacher into host memory.

    Raises:
        ModelError: a layer the teacher does not have, or weights that are not in safetensors.
    """
    config = load_config(directory)
    depth = config.get_text_config().num_hidden_layers
    if max(layers) >= depth:
        raise ModelError(f"student.layers names layer {max(layers)}; {directory} has layers 0 to {depth - 1}")
    _choose_layers(config.get_text_config(), layers)
    model = _AUTO[task].from_config(config, dtype=dtype, trust_remote_code=False)
    # A student layer may appear twice in the teacher's numbering only if the user listed it twice.
    targets: dict[int, list[int]] = {}
    for new, old in enumerate(layers):
        targets.setdefault(old, []).append(new)

    def chosen(name: str) -> list[str]:
        """What a tensor of the teacher is called in the student; several, or none."""
        found = _LAYER.search(name)
        if found is None:
            return [name]
        here = targets.get(int(found.group(2)), [])
        return [name[: found.start()] + f"{found.group(1)}{new}" + name[found.end() :] for new in here]

    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    names, on_disk = set(model.state_dict()), {new for name, _ in _stored_tensors(directory) for new in chosen(name)}
    plain = names - tied <= on_disk <= names
    state = {
        new: read().to(dtype)
        for name, read in (_stored_tensors(directory) if plain else _loaded_tensors(directory, dtype, task))
        for new in chosen(name)
    }
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ModelError(f"the weights of {directory} have other sizes than its config.json says: {error}") from error
    missing = [name for name in result.missing_keys if name not in tied]
    if missing or result.unexpected_keys:
        raise ModelError(
            f"the weights of {directory} do not fit {type(model).__name__} with layers {layers}: missing"
            f" {missing[:3]}, unexpected {result.unexpected_keys[:3]}"
        )
    model.tie_weights()
    return model


def _choose_layers(config: PretrainedConfig, layers: list[int]) -> None:
    """Make ``config`` that of a model of the chosen layers, with what it lists layer by layer (``layer_types``, SmolLM3's
    ``no_rope_layers``)."""
    depth = config.num_hidden_layers
    config.num_hidden_layers = len(layers)
    for name, value in list(vars(config).items()):
        # Where every layer stands in a list of numbers (Llama 4's `moe_layers`), so does every layer of the student. Tokens may
        # be as many as layers by chance.
        by_layer = isinstance(value, list | tuple) and len(value) == depth and not name.endswith("_token_id")
        if by_layer and [*value] != [*range(depth)]:
            setattr(config, name, type(value)(value[layer] for layer in layers))


def _stored_tensors(directory: Path) -> Iterator[tuple[str, Any]]:
    """(name, reader) of every tensor in a safetensors directory; nothing is read until the reader is called."""
    files = weight_files(directory)
    for file in files:
        try:
            with safe_open(directory / file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118  (not a mapping)
                    yield name, lambda stored=stored, name=name: stored.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{directory / file} cannot be read: {error}") from error


def _loaded_tensors(directory: Path, dtype: torch.dtype, task: Task) -> Iterator[tuple[str, Any]]:
    """(name, reader) of every parameter of a model."""
    for name, parameter in load_model(directory, dtype, task).state_dict().items():
        yield name, lambda parameter=parameter: parameter


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Stop training the parameters whose name a pattern finds. Raises: ModelError for a pattern that finds none."""
    for pattern in patterns:
        found = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        if not found:
            raise ModelError(f"student.freeze: {pattern!r} finds no parameter of {type(model).__name__}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ModelError(f"student.freeze = {patterns} leaves nothing to train")


# ---- base and head ----


def head_module(model: PreTrainedModel) -> Any:
    """The last linear layer: of a language model over the vocabulary, of a classifier over the classes. None: there is none."""
    return classifiers.class_head(model) if classifiers.is_classifier(model) else model.get_output_embeddings()


def set_head(model: PreTrainedModel, head: nn.Module) -> None:
    if classifiers.is_classifier(model):
        classifiers.set_class_head(model, head)
    else:
        model.set_output_embeddings(head)


def head_of(model: PreTrainedModel, vocab_size: int) -> tuple[nn.Parameter, nn.Parameter | None, HeadSpec]:
    """Weight, bias and spec of the model's head over a true vocabulary of ``vocab_size``.

    Raises:
        ModelError: no head, or fewer rows than the vocabulary.
    """
    module = head_module(model)
    if module is None:
        raise ModelError(f"{type(model).__name__} has no output embeddings; kdscale distils causal language models")
    rows = getattr(module.weight, "ds_shape", module.weight.shape)[0]
    if classifiers.is_classifier(model):
        if rows != vocab_size:
            raise ModelError(f"{vocab_size} classes are wanted, and the model's head tells {rows} apart")
        return module.weight, getattr(module, "bias", None), classifiers.class_spec(vocab_size)
    if rows < vocab_size:
        raise ModelError(
            f"the tokenizer has {vocab_size} ids, the model's head only {rows} rows; they don't belong together"
        )
    config = model.config.get_text_config()
    # Cohere multiplies its logits, Granite divides them.
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return module.weight, getattr(module, "bias", None), HeadSpec(vocab_size, softcap, float(scale))


def base_hidden(model: PreTrainedModel, ids_RL: torch.Tensor, positions_RL: torch.Tensor) -> torch.Tensor:
    """The input of the head, [R, L, D].

    Restarting positions are all that isolates documents: without a mask and a cache, transformers derives the
    block-diagonal mask of every attention kind (full, sliding) from them.
    """
    hidden: torch.Tensor = model.base_model(
        input_ids=ids_RL, position_ids=positions_RL, attention_mask=None, use_cache=False, return_dict=False
    )[0]
    return hidden


def hidden_states(
    model: PreTrainedModel, inputs_RL: torch.Tensor, beside: torch.Tensor, pixels: Pixels | None = None
) -> torch.Tensor:
    """The head's input at every position, row after row, [N, D]: of a language model (``beside``: positions [R, L]) at every
    token, of a classifier whose head passes it on (``beside``: lengths [R]) of every row."""
    if classifiers.is_classifier(model):
        return classifiers.pooled(model, inputs_RL, beside, pixels)
    return base_hidden(model, inputs_RL, beside).flatten(0, 1)


@torch.no_grad()
def require_known_head(
    model: PreTrainedModel, whole: Callable[[list[nn.Parameter]], AbstractContextManager[object]] = nullcontext
) -> None:
    """Check on one short row that head(base(x)) is what the model itself computes.

    ``whole``: the context in which parameters that are spread over ranks are whole; all ranks call.

    Raises:
        ModelError: the family does something between base and logits that kdscale does not know.
    """
    weight = model.get_output_embeddings().weight
    weight, bias, spec = head_of(model, getattr(weight, "ds_shape", weight.shape)[0])
    positions = torch.arange(8, device=weight.device).unsqueeze(0)
    ids = positions % spec.vocab_size
    was_training = model.training
    model.eval()
    hidden_TD = base_hidden(model, ids, positions)[0]
    with whole([one for one in (weight, bias) if one is not None]):
        ours = head_logits(hidden_TD, weight, bias, spec)
    # Not called as a module: ZeRO-3 would take the modules' order here for that of every later forward.
    theirs = model.forward(input_ids=ids, use_cache=False).logits[0].float()
    model.train(was_training)
    if not torch.allclose(ours, theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max())):
        raise ModelError(
            f"{type(model).__name__} turns hidden states into logits in a way kdscale does not know (off by"
            f" {float((ours - theirs).abs().max()):.3g}); supported are bias, softcap and logit scale"
        )
