"""A run's checkpoints copied behind the training to a store, from where a host without the run's directory goes on.

    URL/step-40/shards/...       the files of ``checkpoints/step-40``
                MANIFEST.json    written last: without it nothing counts, as on disk

A fault of the store is logged and counted, and ends no run. The run's key is not copied: whoever writes to the store could
sign with it. It must be in the run's directory before checkpoints of the mirror count.
"""

import json
import shutil
import threading
import time
from dataclasses import dataclass
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
_SUPERSEDED = f"{MANIFEST}.superseded"


@dataclass(frozen=True)
class Held:
    """A checkpoint that waits to be copied."""

    name: str
    files: Path
    """Where they lie: links of our own, or the checkpoint itself where its disk has no links."""
    linked: bool


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
        self._waiting: Held | None = None
        self._busy = False
        self._wake = threading.Condition()
        threading.Thread(target=self._run, daemon=True, name="mirror").start()

    def offer(self, directory: Path) -> None:
        """Copy this checkpoint as soon as the one before is copied; returns at once. It may be pruned meanwhile."""
        held = _hold(directory)
        with self._wake:
            passed_over, self._waiting = self._waiting, held
            self._wake.notify()
        if passed_over is not None:
            _let_go(passed_over)

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
                held, self._waiting, self._busy = self._waiting, None, True
            try:
                self._copy(held)
                self.copied += 1
            except (StorageError, CheckpointError, OSError) as error:
                self.failures += 1
                _LOG.warning("%s was not copied to %s: %s; training goes on", held.name, self.store.url, error)
            finally:
                _let_go(held)
                self._busy = False

    def _copy(self, held: Held) -> None:
        if self._superseded_after is not None:
            _supersede(self.store, self._superseded_after)
            self._superseded_after = None
        for name in [*sorted(files_of(held.files) - {MANIFEST}), MANIFEST]:
            self.store.put(f"{held.name}/{name}", held.files / name)
        _prune(self.store, self._keep)


def _hold(directory: Path) -> Held:
    """Other names for the checkpoint's files, so that a store slower than saves are pruned gets whole ones. A killed run's are
    cleaned away like what it had half written."""
    links = directory.with_name(f".{directory.name}.mirror.partial")
    try:
        shutil.rmtree(links, ignore_errors=True)
        for name in files_of(directory):
            (links / name).parent.mkdir(parents=True, exist_ok=True)
            (links / name).hardlink_to(directory / name)
    except (OSError, CheckpointError) as error:
        _LOG.debug("%s is copied from its own files: %s", directory, error)
        shutil.rmtree(links, ignore_errors=True)
        return Held(directory.name, directory, linked=False)
    return Held(directory.name, links, linked=True)


def _let_go(held: Held) -> None:
    if held.linked:
        shutil.rmtree(held.files, ignore_errors=True)


def _by_step(store: Store) -> dict[int, dict[str, int]]:
    """Bytes of the files below each step's directory, newest first."""
    found: dict[int, dict[str, int]] = {}
    for path, (num_bytes, _) in store.files().items():
        directory, _, name = path.partition("/")
        if (step := step_of(Path(directory))) is not None and name:
            found.setdefault(step, {})[name] = num_bytes
    return {step: found[step] for step in sorted(found, reverse=True)}


def _steps(store: Store) -> dict[int, dict[str, int]]:
    """``_by_step`` of those that have a manifest."""
    return {step: files for step, files in _by_step(store).items() if MANIFEST in files}


def _supersede(store: Store, after: int = -1) -> None:
    """Checkpoints of steps beyond ``after`` count no more; what was copied stays."""
    for step in _steps(store):
        if step > after:
            store.rename(f"step-{step}/{MANIFEST}", f"step-{step}/{_SUPERSEDED}")


def _prune(store: Store, keep: int) -> None:
    whole = _steps(store)
    for step, files in list(whole.items())[keep:]:
        # The manifest first: half removed it would look like a damaged one.
        names = [MANIFEST, *(name for name in files if name != MANIFEST)]
        store.remove([f"step-{step}/{name}" for name in names])
    # What copies that failed have left: nobody copies to steps below the newest any more.
    left = _by_step(store)
    failed = {step: files for step, files in left.items() if step < max(whole, default=-1)}
    for step, files in failed.items():
        if not files.keys() & {MANIFEST, _SUPERSEDED}:
            store.remove([f"step-{step}/{name}" for name in files])


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
