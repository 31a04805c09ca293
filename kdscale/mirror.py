"""A run's checkpoints copied behind the training to a store, from where a host without the run's directory goes on.

    URL/step-40/shards/...       the files of ``checkpoints/step-40``
                MANIFEST.json    written last: without it nothing counts, as on disk

A fault of the store is logged and counted, and ends no run. The run's key is not copied: whoever writes to the store could
sign with it. It must be in the run's directory before checkpoints of the mirror count.
"""

import json
import threading
import time
from pathlib import Path

from kdscale import log
from kdscale.config.schema import RunConfig
from kdscale.engine import checkpoint
from kdscale.engine.checkpoint import Checkpoint
from kdscale.engine.manifest import MANIFEST, files_of, key_of
from kdscale.engine.staging import by_age, clean, final_directory, step_of
from kdscale.errors import CheckpointError, StorageError
from kdscale.storage import Store, download

_LOG = log.get(__name__)
_POLL_S = 0.05


class Mirror:
    """Copies checkpoints in a thread of its own. Where a newer one comes while one is copied, those between are left out."""

    def __init__(self, url: str, keep: int, start_step: int) -> None:
        """For a run that goes on from ``start_step``: later steps in the store are of another try, and count no more.

        Raises:
            StorageError: a URL that cannot serve.
        """
        self.store, self._keep = Store(url), keep
        self._superseded_after: int | None = start_step
        self.copied = 0
        self.failures = 0
        self._waiting: Path | None = None
        self._busy = False
        self._wake = threading.Condition()
        threading.Thread(target=self._run, daemon=True, name="mirror").start()

    def offer(self, directory: Path) -> None:
        """Copy this checkpoint as soon as the one before is copied; returns at once."""
        with self._wake:
            self._waiting = directory
            self._wake.notify()

    def wait(self, limit_s: float) -> bool:
        """Until all that was offered is copied or has failed; whether it came to that."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            with self._wake:
                if self._waiting is None and not self._busy:
                    return True
            time.sleep(_POLL_S)
        _LOG.warning("%s has not got the newest checkpoint within %g s", self.store.url, limit_s)
        return False

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._waiting is None:
                    self._wake.wait()
                directory, self._waiting, self._busy = self._waiting, None, True
            try:
                self._copy(directory)
                self.copied += 1
            except (StorageError, CheckpointError, OSError) as error:
                self.failures += 1
                _LOG.warning("%s was not copied to %s: %s; training goes on", directory.name, self.store.url, error)
            finally:
                self._busy = False

    def _copy(self, directory: Path) -> None:
        if self._superseded_after is not None:
            _supersede(self.store, self._superseded_after)
            self._superseded_after = None
        for name in [*sorted(files_of(directory) - {MANIFEST}), MANIFEST]:
            self.store.put(f"{directory.name}/{name}", directory / name)
        _prune(self.store, self._keep)


def _steps(store: Store) -> dict[int, dict[str, int]]:
    """Bytes of the files below each step's directory that has a manifest, newest first."""
    found: dict[int, dict[str, int]] = {}
    for path, (num_bytes, _) in store.files().items():
        directory, _, name = path.partition("/")
        if (step := step_of(Path(directory))) is not None and name:
            found.setdefault(step, {})[name] = num_bytes
    return {step: found[step] for step in sorted(found, reverse=True) if MANIFEST in found[step]}


def _supersede(store: Store, after: int = -1) -> None:
    """Checkpoints of steps beyond ``after`` count no more; what was copied stays."""
    for step in _steps(store):
        if step > after:
            store.rename(f"step-{step}/{MANIFEST}", f"step-{step}/{MANIFEST}.superseded")


def _prune(store: Store, keep: int) -> None:
    for step, files in list(_steps(store).items())[keep:]:
        # The manifest first: half removed it would look like a damaged one.
        names = [MANIFEST, *(name for name in files if name != MANIFEST)]
        store.remove([f"step-{step}/{name}" for name in names])


def mirror_of(config: RunConfig) -> str | None:
    """URL of the run's directory in its mirror."""
    mirror = config.checkpoint.mirror
    return None if mirror is None else f"{mirror.rstrip('/')}/{config.run.name}"


def find(config: RunConfig, resume: str) -> Checkpoint | None:
    """``checkpoint.find`` in the run's directory; where that has no checkpoint at all, ``auto`` looks into the mirror too. With
    ``never``, what lies there counts no more either: or a run that starts over and is lost would go on from it.

    Raises:
        StorageError: the mirror cannot be read, or with ``never`` written. Starting over silently would be worse.
        CheckpointError: see ``checkpoint.find`` and ``recover``.
    """
    root, url = Path(config.run.dir) / config.run.name / "checkpoints", mirror_of(config)
    if url is not None and resume == "auto" and not by_age(root):
        recover(root, url)
    elif url is not None and resume == "never":
        _supersede(Store(url))
    return checkpoint.find(root, resume)


def recover(root: Path, url: str) -> None:
    """Fetch the newest whole checkpoint of the mirror into ``root``, if it has any.

    Raises:
        StorageError: the store cannot be read.
        CheckpointError: it holds checkpoints, and none is whole, or the run's key is not here to check with.
        OSError: ``root`` cannot be written.
    """
    store = Store(url)
    steps = _steps(store)
    if not steps:
        return
    if key_of(root.parent) is None:
        raise CheckpointError(
            f"{url} holds step-{max(steps)}, but {root.parent} has not the run's key to check it with; copy .checkpoint-key"
            " there from where the run began, or start over with --resume never"
        )
    root.mkdir(parents=True, exist_ok=True)
    clean(root)
    for step, files in steps.items():
        directory = final_directory(root, step)
        # What an interrupted copy to the mirror left beside the manifest's files is not of this checkpoint.
        manifest = root / f".step-{step}.manifest.partial"
        manifest.mkdir()
        store.get(f"step-{step}/{MANIFEST}", manifest / MANIFEST)
        try:
            listed = json.loads((manifest / MANIFEST).read_text())["content"]["files"]
            download(Store(f"{url}/step-{step}"), {name: files[name] for name in [*listed, MANIFEST]}, directory)
            checkpoint.verify(directory)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            _LOG.warning("skipping %s/step-%d: %r", url, step, error)
            if directory.is_dir():
                directory.rename(root / f".step-{step}.damaged.partial")
            continue
        finally:
            clean(root)
        _LOG.warning("%s held no checkpoint; step-%d was fetched from %s", root, step, url)
        return
    raise CheckpointError(f"{url} holds {len(steps)} checkpoint(s) and none is whole; start over with --resume never")
