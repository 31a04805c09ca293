"""DeepSpeed's checkpoint engine of kdscale: what it is told to save is cloned to host memory, and written by nobody yet.

DeepSpeed hands over live tensors, and ends in a barrier: an exception on one rank would leave the others waiting in it. So
nothing in here raises while saving, and no disk is touched; ``take`` gives the clones, or what went wrong.
"""

import copy
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

from kdscale.errors import CheckpointError

_ALLOWED = [LossScaler, ZeroStageEnum, fragment_address]
"""What DeepSpeed's files hold, or have held, besides tensors and plain values; nothing else is unpickled."""


@dataclass
class Captured:
    """One rank's share of a checkpoint, in host memory."""

    files: dict[str, Any] = field(default_factory=dict)
    """State by path inside the checkpoint."""
    num_bytes: int = 0
    fault: Exception | None = None
    """Why it is not whole."""


class HostCapture(CheckpointEngine):
    """Saves into ``Captured``, loads from disk."""

    def __init__(self, module: nn.Module) -> None:
        """``module`` is what is trained."""
        super().__init__()
        self.name = "HostCapture"
        self._module = module
        self._root = Path()
        self._captured = Captured()
        self._refusal: Exception | None = None

    def refuse(self, reason: Exception | None) -> None:
        """Keep nothing from here on, for ``reason``; none takes that back."""
        self._refusal = reason

    def create(self, info: CheckpointCommitInfo) -> None:
        """DeepSpeed begins to save into ``info.save_dir``."""
        self._root, self._captured = Path(info.save_dir), Captured(fault=self._refusal)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Who writes the files makes their directories."""

    def save(self, state_dict: Any, path: str) -> None:
        captured = self._captured
        if captured.fault is not None:
            return
        try:
            clones = _Clones(self._module)
            name = Path(path).relative_to(self._root).as_posix()
            captured.files[name] = clones.of(_without_frozen(self._module, state_dict))
            captured.num_bytes += clones.num_bytes
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must not be left in DeepSpeed's barrier
            captured.fault = error
            captured.files.clear()

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True

    def preserves_storage_sharing(self) -> bool:
        """Every tensor is cloned alone, so DeepSpeed need not do it once more."""
        return False

    def take(self) -> Captured:
        """What was saved since ``create``; nothing of it stays here."""
        captured, self._captured = self._captured, Captured()
        return captured

    def load(self, path: str, map_location: Any = None) -> Any:
        """Raises: CheckpointError."""
        return load_shard(Path(path), map_location)


def _without_frozen(module: nn.Module, state: Any) -> Any:
    """What is saved of a model that is not cut into stages: frozen weights are where the student began, and a checkpoint
    holds their digests. DeepSpeed leaves out the first name of each alone, so that a tied head would stay."""
    if not isinstance(state, dict) or not isinstance(state.get("module"), dict):
        return state
    # A shallow copy keeps the class and what is noted on it (a state dict's ``_metadata``).
    weights = copy.copy(state["module"])
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            weights.pop(name, None)
    return state | {"module": weights}


def load_shard(path: Path, map_location: Any = "cpu", *, mapped: bool = False) -> Any:
    """One of DeepSpeed's files; ``mapped``: its tensors are read when they are used.

    Raises:
        CheckpointError: it cannot be read, or holds other objects than tensors, plain values and ``_ALLOWED``.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location=map_location, mmap=mapped, weights_only=True)
    except Exception as error:  # torch.load raises whatever the unpickler met
        raise CheckpointError(f"{path} cannot be read: {error}") from error


class _Clones:
    """Deep copies on the host; what is one tensor under several names stays one, and frozen weights there need no copy."""

    def __init__(self, module: nn.Module) -> None:
        frozen = (one for one in module.parameters() if not one.requires_grad and one.device.type == "cpu")
        self._frozen = {one.data_ptr() for one in frozen if one.untyped_storage().nbytes() == one.nbytes}
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}
        self.num_bytes = 0

    def of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            made = copy.copy(value)
            for key, item in value.items():
                made[key] = self.of(item)
            return made
        if type(value) in (list, tuple):
            return type(value)(self.of(item) for item in value)
        if isinstance(value, Enum):
            # Early releases of Python 3.11 pickle a member as a call of ``getattr``, which nobody should unpickle.
            return value.value
        return copy.deepcopy(value)

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        tensor = value.detach()
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or place not in self._made:
            made = tensor
            if tensor.data_ptr() not in self._frozen:
                made = torch.empty(tensor.shape, dtype=tensor.dtype)
                made.copy_(tensor)
            self._made[place] = made
            self.num_bytes += made.nbytes
        return self._made[place]


def install(engine: DeepSpeedEngine) -> HostCapture:
    """Make ``engine`` save into host memory; returns where."""
    if not isinstance(engine.checkpoint_engine, HostCapture):
        engine.checkpoint_engine = HostCapture(engine.module)
        # Under ZeRO rank 0 copies two scripts beside the shards; a full disk would leave the other ranks in the barrier.
        engine._copy_recovery_script = lambda directory: None
    return engine.checkpoint_engine
