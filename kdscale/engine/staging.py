"""Directories of checkpoints: staged under a name that does not count, published by a rename, pruned, set aside.

checkpoints/step-40/                 counts once its manifest verifies
            .step-60.8f3a2c.partial/  being written; rubbish once the process that wrote it is gone
            latest                   a hint; the newest directory that verifies is what counts
"""

import re
import shutil
from pathlib import Path

from kdscale import log
from kdscale.durable import sync_directory, write_durably

_LOG = log.get(__name__)
_STEP = re.compile(r"step-(\d+)")


def step_of(directory: Path) -> int | None:
    """The step that a directory is named for."""
    match = _STEP.fullmatch(directory.name)
    return int(match.group(1)) if match else None


def by_age(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of what bears a checkpoint's name, newest first."""
    if not root.is_dir():
        return []
    found = [(step, path) for path in root.iterdir() if (step := step_of(path)) is not None]
    return sorted(found, reverse=True)


def final_directory(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def staging_directory(root: Path, step: int, token: str) -> Path:
    """``token`` is the saving process group's own: what another one left or still writes is not mixed with it."""
    return root / f".step-{step}.{token}.partial"


def clean(root: Path) -> None:
    """Remove what killed runs left half written, as far as it can be removed."""
    for path in root.glob(".step-*.partial"):
        # A rank that was given up may still be writing there; what it leaves goes the next time.
        shutil.rmtree(path, ignore_errors=True)


def publish(staging: Path, final: Path, keep: int) -> None:
    """Give a whole checkpoint its name, and remove the oldest beyond ``keep``. Raises: OSError: it has not got its name."""
    staging.rename(final)
    root = final.parent
    sync_directory(root)
    try:
        write_durably(root / "latest", final.name.encode())
        for _, directory in by_age(root)[keep:]:
            # Half removed it would look like a damaged one.
            going = directory.rename(root / f".{directory.name}.pruned.partial")
            shutil.rmtree(going)
    except OSError as error:
        _LOG.warning("%s is saved, but tidying up behind it failed: %s", final, error)


def set_aside(root: Path, after: int = -1) -> None:
    """Give the checkpoints of steps beyond ``after`` another place, so that a run from there cannot mix with them.

    Raises:
        OSError: they cannot be renamed.
    """
    newer = [path for step, path in by_age(root) if step > after]
    if not newer:
        return
    number = 1
    while (aside := root.with_name(f"{root.name}.{number}")).exists():
        number += 1
    aside.mkdir()
    for path in newer:
        path.rename(aside / path.name)
    (root / "latest").unlink(missing_ok=True)
    sync_directory(root)
    sync_directory(aside)
    _LOG.warning("%d checkpoint(s) beyond step %d now lie in %s", len(newer), max(after, 0), aside)
