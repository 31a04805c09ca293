"""A trained student as a Hugging Face model directory that plain transformers loads."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import nn
from transformers import PreTrainedModel

from kdscale.engine.checkpoint import Checkpoint
from kdscale.engine.families import in_sequence
from kdscale.engine.sharding import gathered
from kdscale.errors import CheckpointError

_PREFIX = "model."


def whole_state(model: PreTrainedModel, rank: int) -> dict[str, torch.Tensor]:
    """The full state dict on rank 0 (elsewhere empty), one gathered parameter at a time; every rank calls it."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            if rank == 0:
                state[name] = parameter.detach().cpu().clone()
    if rank == 0:
        parameters = set(state)
        persistent = {name: value for name, value in model.state_dict().items() if value.numel()}
        state |= {
            name: value for name, value in persistent.items() if name not in parameters and name in _buffers(model)
        }
    return state


def _buffers(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_buffers()}


def write_model(
    model: PreTrainedModel, state: dict[str, torch.Tensor], directory: Path, save_tokenizer: Callable[[Path], None]
) -> None:
    """Write config, safetensors and tokenizer aside, then put them in place of ``directory``."""
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    # Students run with their cache on; it is only training that has no use for it.
    model.config.use_cache = True
    model.save_pretrained(staging, state_dict=state)
    model.config.use_cache = False
    save_tokenizer(staging)
    shutil.rmtree(directory, ignore_errors=True)
    staging.rename(directory)


def load_checkpoint_weights(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's trained weights into ``model`` (unsharded, in host memory).

    Raises:
        CheckpointError: the shards do not hold this model.
    """
    shards = checkpoint.directory / "shards"
    if any(shards.glob("layer_*")):
        _load_stages(model, shards)
        return
    if any(shards.glob("*zero_pp_rank_*")):
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.directory), tag="shards")
    else:
        # The files were hashed against the manifest; DeepSpeed's own objects beside the weights need the allow-list off.
        state = torch.load(shards / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    named = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    result = model.load_state_dict(named, strict=False)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = [name for name in result.missing_keys if name not in tied]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"{checkpoint.directory} does not hold this student: missing {missing[:3]}, unexpected"
            f" {result.unexpected_keys[:3]}"
        )
    model.tie_weights()


def _load_stages(model: PreTrainedModel, shards: Path) -> None:
    """Put a pipeline's weights into ``model``: DeepSpeed writes one file for each module in the sequence, head last."""
    modules = in_sequence(model)
    files = sorted(
        shards.glob("layer_*-model_states.pt"), key=lambda file: int(file.name.split("-")[0].removeprefix("layer_"))
    )
    try:
        for module, file in zip([*modules, None], files, strict=True):
            state = torch.load(file, map_location="cpu", weights_only=True)
            if module is None:
                head = {name.removeprefix("head."): value for name, value in state.items()}
                model.get_output_embeddings().load_state_dict(head)
            else:
                module.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{shards} does not hold this student: {error}") from error
