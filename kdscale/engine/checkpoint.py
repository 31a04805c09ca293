"""Sharded checkpoints: written aside, hashed, and made to exist by a manifest that is written last.

checkpoints/step-40/MANIFEST.json      what is here (sha256 of every file), of which run, at which step
                    shards/...         DeepSpeed's files, one per rank and kind
                    index-0.json         where in them rank 0's part of each parameter lies
                    state-0.safetensors  rank 0's random state
            latest                     a hint; the newest directory that verifies is what counts
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors.torch import save_file

from kdscale import log
from kdscale.engine.process import any_rank, barrier
from kdscale.engine.shards import SHARDS
from kdscale.errors import CheckpointError

_LOG = log.get(__name__)
_MANIFEST = "MANIFEST.json"
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose manifest verified."""

    directory: Path
    step: int
    """Optimizer steps done, which is also the next batch number."""
    identity: dict[str, Any]
    """What the run means: a run that means something else must not go on from here."""
    notes: dict[str, Any]
    """What the run wants to know again: quality before training, tokens trained, time spent."""


def save(
    engine: deepspeed.DeepSpeedEngine,
    root: Path,
    step: int,
    *,
    identity: dict[str, Any],
    notes: dict[str, Any],
    rank: int,
    world: int,
    keep: int,
    small: dict[str, bytes] | None = None,
) -> Path:
    """Write ``root/step-N`` on storage that all ranks share; every rank calls it.

    ``small`` are further files of this rank, by path inside the checkpoint.

    A rank whose write fails says so to the others, so none is left waiting; older checkpoints stay untouched.

    Raises:
        CheckpointError: on every rank, when any rank could not write.
    """
    final = root / f"step-{step}"
    staging = root / f".step-{step}.partial"
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    barrier()
    engine.save_checkpoint(str(staging), tag=SHARDS, save_latest=False)
    fault: OSError | None = None
    try:
        save_file({"torch": torch.get_rng_state()}, staging / f"state-{rank}.safetensors")
        for name, data in (small or {}).items():
            (staging / name).write_bytes(data)
        barrier()
        files = sorted(path for path in staging.rglob("*") if path.is_file() and path.suffix != ".hashes")
        hashes = {str(path.relative_to(staging)): _sync_and_hash(path) for path in files[rank::world]}
        (staging / f"rank-{rank}.hashes").write_text(json.dumps(hashes))
    except OSError as error:
        fault = error
    if any_rank(fault is not None, engine.device):
        raise CheckpointError(
            f"checkpoint step-{step} could not be written: {fault or 'another rank failed'}"
        ) from fault
    if rank == 0:
        merged: dict[str, str] = {}
        for part in staging.glob("rank-*.hashes"):
            merged.update(json.loads(part.read_text()))
            part.unlink()
        manifest = {"version": 1, "step": step, "world": world, "identity": identity, "notes": notes, "sha256": merged}
        _write_durably(staging / _MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        _write_durably(root / "latest", final.name)
        _prune(root, keep)
    barrier()
    return final


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _prune(root: Path, keep: int) -> None:
    for _, directory in _by_age(root)[keep:]:
        shutil.rmtree(directory, ignore_errors=True)


def _by_age(root: Path) -> list[tuple[int, Path]]:
    """(step, directory), newest first."""
    if not root.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in root.iterdir() if (match := _STEP.fullmatch(path.name))]
    return sorted(found, reverse=True)


def verify(directory: Path) -> Checkpoint:
    """Read the manifest and hash every file it names. Raises: CheckpointError naming what is wrong."""
    try:
        manifest = json.loads((directory / _MANIFEST).read_text())
        for name, expected in manifest["sha256"].items():
            path = directory / name
            if not path.resolve().is_relative_to(directory.resolve()):
                raise CheckpointError(f"{directory}: the manifest names {name}, which lies outside")
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    raise CheckpointError(f"{path} is damaged: its sha256 is not the manifest's")
        return Checkpoint(directory, int(manifest["step"]), dict(manifest["identity"]), dict(manifest["notes"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory} is not a whole checkpoint: {error!r}") from error


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint under ``root`` that verifies; damaged ones are named and skipped.

    Raises:
        CheckpointError: there are checkpoints, but none is whole. Starting over silently would be worse.
    """
    candidates = _by_age(root)
    for _, directory in candidates:
        try:
            return verify(directory)
        except CheckpointError as error:
            _LOG.warning("skipping a checkpoint: %s", error)
    if candidates:
        raise CheckpointError(
            f"{root} holds {len(candidates)} checkpoint(s) and none is whole; repair or remove them, or start over with"
            " --resume never"
        )
    return None


def find(root: Path, resume: str) -> Checkpoint | None:
    """Where to go on from: ``auto`` the newest whole checkpoint, ``never`` none, else the one at that path.

    With ``never``, checkpoints of an earlier run are set aside, not removed.

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
            return verify(Path(path))


def set_aside(root: Path) -> None:
    """Give an earlier run's checkpoints another name, so that a run from zero cannot mix with them."""
    if _by_age(root):
        number = 1
        while (aside := root.with_name(f"{root.name}.{number}")).exists():
            number += 1
        root.rename(aside)
        _LOG.warning("checkpoints of an earlier run now lie in %s", aside)
