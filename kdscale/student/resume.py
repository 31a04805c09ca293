"""A student rank goes on from a checkpoint: what may differ is decided, what does is recorded, the state is taken over."""

from typing import Any

import torch

from kdscale import identity as identities
from kdscale import log
from kdscale.engine.checkpoint import Checkpoint
from kdscale.engine.environment import environment
from kdscale.engine.process import same_on_all_ranks
from kdscale.engine.restore import Way, restore
from kdscale.errors import PlacementError
from kdscale.student.layout import Student
from kdscale.student.worker import StudentSetup

_LOG = log.get(__name__)
WAYS: dict[Way, str] = {
    "exact": "every rank from its own shards, bit for bit",
    "converted": "parameter by parameter: ranks, ZeRO stage or dtype are not the checkpoint's",
}
_MEASURED = {"corpus", "teacher", "tokenizer", "data.heldout_tokens", "data.row_tokens", "data.packing"}
"""What held-out quality is measured with."""


def go_on_from(
    found: Checkpoint, setup: StudentSetup, student: Student, dtype: str, device: torch.device, rank: int, world: int
) -> tuple[Way, dict[str, Any]]:
    """Bring ``student`` to where ``found`` was saved; returns the way, and the notes with what has changed since.

    Raises:
        CheckpointError: a change of settings, dtype or (in deterministic mode) environment that may not be; or a
            checkpoint that cannot be restored.
    """
    then = found.identity | found.environment | {"student.dtype": found.notes["dtype"]}
    now = setup.identity | environment(device) | {"student.dtype": dtype}
    changed = identities.require_resumable(
        str(found.directory),
        identities.changes(then, now),
        deterministic=setup.config.run.deterministic,
        allowed=setup.config.checkpoint.allow_changed,
    )
    way = restore(student.engine, student.partition, found, rank, world)
    if rank == 0 and changed:
        _LOG.warning("going on from %s with changes: %s", found.directory, "; ".join(one.line() for one in changed))
    records = [{"step": found.step, "name": one.name, "then": one.then, "now": one.now} for one in changed]
    notes = dict(found.notes)
    if any(one.name in _MEASURED for one in changed):
        # Measured on other text, or against another teacher: what comes after could not be compared with it.
        notes.pop("quality_before", None)
    return way, notes | {"changes": [*notes.get("changes", []), *records]}


def require_one_environment(device: torch.device) -> None:
    """Every rank calls it. Raises: PlacementError when ranks compute in different environments."""
    here = environment(device)
    if not same_on_all_ranks(repr(here), device):
        listed = ", ".join(f"{name.removeprefix('environment.')} {value}" for name, value in here.items())
        raise PlacementError(
            f"run.deterministic = true needs student ranks of one kind, and they differ; this one has {listed}. Place them"
            " on like nodes, or set run.deterministic: false"
        )
