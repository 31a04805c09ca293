"""The random state of a rank (torch, GPU, NumPy, Python) as one safetensors file, never a pickle."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kdscale.errors import CheckpointError


def state_file(rank: int) -> str:
    """Where a rank's random state lies inside a checkpoint."""
    return f"state-{rank}.safetensors"


def random_state() -> bytes:
    """The state of every generator of this process, as the file's bytes."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, python_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "python": torch.tensor(internal, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors |= {"cuda": torch.cuda.get_rng_state()}
    plain = {
        "numpy": {"position": position, "has_gauss": has_gauss, "gauss": gauss},
        "python": {"version": version, "gauss": python_gauss},
    }
    return save(tensors, metadata={name: json.dumps(fields) for name, fields in plain.items()})


def set_random_state(path: Path) -> None:
    """Bring every generator to where ``random_state`` found it. Raises: CheckpointError."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            numpy: dict[str, Any] = json.loads(file.metadata()["numpy"])
            python: dict[str, Any] = json.loads(file.metadata()["python"])
        keys = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
        random.setstate((python["version"], tuple(tensors["python"].tolist()), python["gauss"]))
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds no random state: {error!r}") from error
