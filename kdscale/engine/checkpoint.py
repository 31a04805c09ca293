"""Checkpoints: found again and verified. ``saver`` writes them, ``restore`` goes on from one.

checkpoints/step-40/MANIFEST.json      what is here, of which run, at which step; signed, written last (``manifest``)
                    shards/...         DeepSpeed's files, one per rank and kind
                    index-0.json         where in them rank 0's part of each parameter lies
                    state-0.safetensors  rank 0's random state
            latest                     a hint; the newest directory that verifies is what counts
.checkpoint-key                        the key of the signatures, beside ``checkpoints/``
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdscale import log
from kdscale.engine import manifest
from kdscale.engine.manifest import Layout, key_of
from kdscale.engine.staging import by_age, set_aside, step_of
from kdscale.errors import CheckpointError

_LOG = log.get(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A directory that verified."""

    directory: Path
    step: int
    """Optimizer steps done, which is also the next batch number."""
    identity: dict[str, Any]
    """What the run means: a run that means something else must not go on from here."""
    notes: dict[str, Any]
    """What the run wants to know again: quality before training, tokens trained, time spent."""
    layout: Layout
    """How the student lay on its ranks."""
    environment: dict[str, str]
    """Versions, instruction set and threads it was made with."""
    signed: bool
    """By the run's key; else that key was not there to check with."""


def verify(directory: Path, share: tuple[int, int] = (0, 1)) -> Checkpoint:
    """Check the manifest and hash every file; the signature too where the run's key lies beside ``directory``'s parent.

    ``share``: (this rank, ranks) of a group whose ranks hash a part each.

    Raises:
        CheckpointError: naming what is wrong.
    """
    try:
        found = manifest.verify(directory, key_of(directory.absolute().parent.parent), share)
    except OSError as error:
        raise CheckpointError(f"{directory}: the key of its run cannot be read: {error}") from error
    content = found.content
    if step_of(directory) not in (None, content.step):
        raise CheckpointError(f"{directory} holds step {content.step}: it is not what its name says")
    return Checkpoint(
        directory, content.step, content.identity, content.notes, content.layout, content.environment, found.signed
    )


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint under ``root`` that verifies, signature included; others are named and skipped.

    Raises:
        CheckpointError: there are checkpoints, but none is whole. Starting over silently would be worse.
    """
    candidates = by_age(root)
    for _, directory in candidates:
        try:
            found = verify(directory)
        except CheckpointError as error:
            _LOG.warning("skipping a checkpoint: %s", error)
            continue
        if found.signed:
            return found
        _LOG.warning(
            "skipping %s: its signature cannot be checked without the run's key; to trust it, name it: --resume %s",
            directory,
            directory,
        )
    if candidates:
        raise CheckpointError(
            f"{root} holds {len(candidates)} checkpoint(s) and none is whole and signed by the run; repair or remove them,"
            " name one with --resume PATH, or start over with --resume never"
        )
    return None


def find(root: Path, resume: str) -> Checkpoint | None:
    """Where to go on from: ``auto`` the newest whole checkpoint, ``never`` none, else the one at that path.

    With ``never``, checkpoints of an earlier run are set aside, not removed. One at a path counts by its hashes alone where
    its run's key is not with it, and the log says so.

    Raises:
        CheckpointError: a named checkpoint is damaged, or no checkpoint of several is whole.
    """
    match resume:
        case "auto":
            return newest(root)
        case "never":
            set_aside(root)
            return None
        case path:
            found = verify(Path(path))
            if not found.signed:
                _LOG.warning(
                    "%s: hashes agree, but its signature cannot be checked: the key of its run is not beside it", path
                )
            return found
