"""A trained student as a Hugging Face model directory that plain transformers loads."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from kdscale.config.sections import ExportForm
from kdscale.engine.checkpoint import Checkpoint
from kdscale.engine.layers import PROJECTED
from kdscale.engine.lora import merged
from kdscale.engine.partition import digest
from kdscale.engine.sharding import gathered
from kdscale.engine.shards import Shards, require_same_frozen
from kdscale.errors import CheckpointError, ConfigError

_MARK = ".kdscale-export"
"""Tells that a directory is an export, and in which form: a later one may replace it."""
_GGUF = b"GGUF"
"""What a GGUF file begins with."""


def whole_state(model: PreTrainedModel, rank: int) -> dict[str, torch.Tensor]:
    """The full state dict on rank 0 (elsewhere empty), one gathered parameter at a time; every rank calls it."""
    state = _whole(model.named_parameters(), rank)
    if rank == 0:
        parameters = set(state)
        persistent = {name: value for name, value in model.state_dict().items() if value.numel()}
        state |= {
            name: value for name, value in persistent.items() if name not in parameters and name in _buffers(model)
        }
    return state


def trained_state(model: PreTrainedModel, rank: int) -> dict[str, torch.Tensor]:
    """Like ``whole_state``, of the trained parameters alone."""
    return _whole(((name, one) for name, one in model.named_parameters() if one.requires_grad), rank)


def _whole(parameters: Iterable[tuple[str, nn.Parameter]], rank: int) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for name, parameter in parameters:
        with gathered([parameter]):
            if rank == 0:
                state[name] = parameter.detach().cpu().clone()
    return state


def _buffers(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_buffers()}


def write_model(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    directory: Path,
    save_reader: Callable[[Path], None],
    shard_bytes: int,
) -> None:
    """Write config, what inputs are read by and safetensors (adapters merged) of at most ``shard_bytes`` each aside, then put
    them in place of ``directory``; what stood there goes when they have its name."""
    staging = staged(directory, "hf")
    # Students run with their cache on; it is only training that has no use for it.
    cached = hasattr(model.config, "use_cache")
    if cached:
        model.config.use_cache = True
    model.save_pretrained(staging, state_dict=merged(model, state), max_shard_size=shard_bytes)
    if cached:
        model.config.use_cache = False
    save_reader(staging)
    put_in_place(staging, directory)


def require_replaceable(out: Path, form: ExportForm) -> None:
    """Whether an export in ``form`` may take the place of what lies at ``out``: of nothing, or an empty directory, or an earlier
    export in that form. A GGUF file replaces any other, but no directory.

    Raises: ConfigError.
    """
    if not out.exists():
        return
    if form == "gguf":
        replaceable, kind = _is_gguf(out), "GGUF file"
    else:
        replaceable, kind = _is_free(out) or _form_of(out) == form, f"{form} export of kdscale"
    if not replaceable:
        raise ConfigError(f"--out {out} exists and is no {kind}; name another one, or move it away")


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_GGUF)) == _GGUF


def _is_free(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _form_of(directory: Path) -> str | None:
    """In which ``staged`` began the export at ``directory``; none for what is no export."""
    mark = directory / _MARK
    return mark.read_text().strip() if mark.is_file() else None


def staged(directory: Path, form: ExportForm) -> Path:
    """A fresh directory beside ``directory``, marked as an export in ``form``, to be written and put in its place."""
    staging = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    (staging / _MARK).write_text(f"{form}\n")
    return staging


def put_in_place(staging: Path, directory: Path) -> None:
    """Give ``staging`` the name of ``directory``; what stood there goes when it has."""
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    staging.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def load_checkpoint_weights(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's trained weights into ``model`` (unsharded, in host memory), in the model's dtype.

    Frozen parameters are no part of a checkpoint's states: they must be what the model starts with.

    Raises:
        CheckpointError: the shards do not hold this model, or it was trained beside other frozen parameters.
    """
    shards = Shards(checkpoint.directory)
    parameters = dict(model.named_parameters())
    names = [name for name in shards.names if not name.startswith(f"{PROJECTED}.")]
    stored = {*names, *shards.frozen}
    if stored != parameters.keys():
        raise CheckpointError(
            f"{checkpoint.directory} does not hold this student: missing {sorted(parameters.keys() - stored)[:3]},"
            f" unexpected {sorted(stored - parameters.keys())[:3]}"
        )
    for name in names:
        if shards.shape(name) != list(parameters[name].shape):
            raise CheckpointError(
                f"{checkpoint.directory} does not hold this student: {name} is {shards.shape(name)} there and"
                f" {list(parameters[name].shape)} here"
            )
        parameters[name].copy_(shards.read(name, "master"))
    require_same_frozen(checkpoint.directory, {name: digest(parameters[name]) for name in shards.frozen}, shards)
