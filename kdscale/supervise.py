"""The parent of a run: owns its processes and temporary files, and sweeps what is left when anything inside dies.

``kdscale train`` is the supervisor; the driver is its child in a session of its own. ``kdscale.launcher`` is one too, of the
ranks under the DeepSpeed launcher on its host. Every process of a run, Ray's daemons and actors included, inherits
``KDSCALE_RUN_MARK`` and is found by it, whoever its parent has become. A lifeline (a named pipe) tells those who follow it
when the supervisor is gone, or lets go of them: they stop as if asked to, and sweep in its place.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from kdscale import log
from kdscale.errors import PlacementError

_LOG = log.get(__name__)
_MARK = "KDSCALE_RUN_MARK"
_TEMP = "KDSCALE_TEMP_DIR"
_LIFELINE = "lifeline"
_LONGEST_TEMP = 40
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""


class Owned:
    """What a supervisor owns: its run's mark, temporary directory and lifeline."""

    def __init__(self, lock: IO[str]) -> None:
        self.lock = lock
        self.mark = uuid.uuid4().hex
        self.temp = Path(_make_temp())
        pipe = self.temp / _LIFELINE
        os.mkfifo(pipe, 0o600)
        # Open both ways: opening it to write alone would wait for a reader.
        self._held: int | None = os.open(pipe, os.O_RDWR | os.O_CLOEXEC)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {_MARK: self.mark, _TEMP: str(self.temp)}

    def let_go(self) -> None:
        """Ask who follows the lifeline to save and leave."""
        if self._held is not None:
            # A lifeline that is there and held by nobody tells that the supervisor is gone.
            (self.temp / _LIFELINE).unlink()
            os.close(self._held)
            self._held = None

    def sweep(self) -> int:
        """SIGKILL what is left of the run; returns how many there were."""
        return sweep(self.mark, spare={os.getpid()})


@contextlib.contextmanager
def owned(lock_file: Path) -> Iterator[Owned]:
    """The lock, and a mark, directory and lifeline; nothing of the run is left when the context ends.

    Raises:
        PlacementError: another process works on the same run.
    """
    with only_one(lock_file) as lock:
        run = Owned(lock)
        try:
            yield run
        finally:
            run.let_go()
            run.sweep()
            shutil.rmtree(run.temp, ignore_errors=True)


def supervise(run: Owned, command: list[str], grace_seconds: float) -> int:
    """Run ``command``, the driver of ``run``, and return its exit code.

    SIGINT and SIGTERM ask the driver to save and leave; what is alive after ``grace_seconds`` is killed.
    """
    # The driver holds the lock too, for when this process is killed.
    child = subprocess.Popen(command, env=run.environment, pass_fds=(run.lock.fileno(),), start_new_session=True)
    return _wait(child, grace_seconds)


@contextlib.contextmanager
def only_one(lock_file: Path, way_out: str = "give this run another run.name") -> Iterator[IO[str]]:
    """Hold a directory's lock; it dies with its last holder, so there is no stale one.

    Raises:
        PlacementError: it is held, or cannot be made.
    """
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        opened = lock_file.open("a")
    except OSError as error:
        raise PlacementError(f"{lock_file} cannot be made ({error}); name a directory that can be written") from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlacementError(
                f"another process works on {lock_file.parent}; wait for it to end, or {way_out}"
            ) from None
        yield lock


def filling(recording: Path) -> contextlib.AbstractContextManager[IO[str]]:
    """Hold the lock of a recording: two that fill it would write the same files.

    Raises:
        PlacementError: it is held, or cannot be made.
    """
    return only_one(recording / ".filling.lock", way_out="name another directory for the recording")


def _make_temp() -> str:
    """Ray puts Unix sockets about 65 characters below it, and a socket's path ends at 107: /tmp where TMPDIR is deep."""
    deep = len(tempfile.gettempdir()) + len("/kdscale-12345678") > _LONGEST_TEMP
    return tempfile.mkdtemp(prefix="kdscale-", dir="/tmp" if deep else None)


@dataclass
class Wish:
    """What SIGINT and SIGTERM have asked of a supervisor. Plain flags: a signal may come while a lock of its own is held."""

    leave: bool = False
    at_once: bool = False
    """Asked again."""


@contextlib.contextmanager
def listening() -> Iterator[Wish]:
    """Hear SIGINT and SIGTERM for as long as the context lasts."""
    wish = Wish()

    def ask(signum: int, frame: FrameType | None) -> None:
        wish.at_once, wish.leave = wish.leave, True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(child: "subprocess.Popen[bytes]", grace_seconds: float) -> int:
    with listening() as wish:
        while child.poll() is None and not wish.leave:
            time.sleep(0.05)
        if child.poll() is None:
            child.terminate()
        deadline = time.monotonic() + grace_seconds + 1.0
        while child.poll() is None and time.monotonic() < deadline and not wish.at_once:
            time.sleep(0.05)
        if child.poll() is None:
            if not wish.at_once:
                _LOG.warning("the driver did not leave within %g s of grace; killing it", grace_seconds)
            child.kill()
        code = child.wait()
    if wish.leave:
        return INTERRUPTED
    if code < 0:
        print(f"kdscale: the driver was killed by {signal.Signals(-code).name}", file=sys.stderr)
        return 128 - code
    return code


def sweep(mark: str, spare: set[int]) -> int:
    """SIGKILL every process that carries ``mark``, but for ``spare``; returns how many there were."""
    swept = 0
    for _ in range(20):
        left = [one for one in psutil.process_iter() if one.pid not in spare and _carries(one, mark)]
        if not left:
            break
        for process in left:
            try:
                process.kill()
                swept += 1
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=0.5)
    return swept


def _carries(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


# ---- inside the driver, or a launched rank ----


def temp_dir() -> str | None:
    """The run's temporary directory, which the supervisor removes."""
    return os.environ.get(_TEMP)


def follow_supervisor(grace_seconds: float) -> None:
    """Ask this process to stop when its supervisor is gone or has let go, and sweep in its place once the grace is over."""
    temp, mark = temp_dir(), os.environ.get(_MARK)
    if temp is None or mark is None:
        return
    try:
        # Without waiting for a writer: the supervisor may be gone already.
        lifeline: int | None = os.open(Path(temp) / _LIFELINE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        lifeline = None

    def watch() -> None:
        if lifeline is not None:
            os.set_blocking(lifeline, True)
            os.read(lifeline, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_seconds + 1.0)
        leave(mark)
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True, name="lifeline").start()


def leave(mark: str | None = None) -> None:
    """The driver's last act: nothing of the run outlives it, whether or not a supervisor is there to look."""
    mark = mark or os.environ.get(_MARK)
    if mark:
        sweep(mark, spare={os.getpid(), os.getppid()})
    tidy()


def tidy() -> None:
    """Remove the run's temporary directory where the supervisor is gone."""
    temp = temp_dir()
    if temp is None or not _abandoned(Path(temp) / _LIFELINE):
        return
    # Another rank may still write there: it finds no directory from here on.
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(Path(temp).rename(f"{temp}.gone"), ignore_errors=True)


def _abandoned(lifeline: Path) -> bool:
    try:
        end = os.open(lifeline, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        return os.read(end, 1) == b""
    except BlockingIOError:
        return False
    finally:
        os.close(end)
