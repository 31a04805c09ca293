"""The parent of a run: owns its processes and temporary files, and sweeps what is left when anything inside dies.

``kdscale train`` is the supervisor; the driver is its child in a session of its own. Every process of a run, Ray's
daemons and actors included, inherits ``KDSCALE_RUN_MARK`` and is found by it, whoever its parent has become. A pipe tells
the driver when the supervisor is gone: it then stops as if asked to, and sweeps in its place.
"""

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
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from kdscale import log
from kdscale.errors import PlacementError

_LOG = log.get(__name__)
_MARK = "KDSCALE_RUN_MARK"
_TEMP = "KDSCALE_TEMP_DIR"
_LIFELINE = "KDSCALE_LIFELINE_FD"
_LONGEST_TEMP = 40
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM."""


def supervise(command: list[str], lock_file: Path, grace_seconds: float) -> int:
    """Run ``command`` (a driver) and return its exit code; nothing of it is left when this returns.

    SIGINT and SIGTERM ask the driver to save and leave; what is alive after ``grace_seconds`` is killed.

    Raises:
        PlacementError: another process works on the same run.
    """
    mark = uuid.uuid4().hex
    with only_one(lock_file) as lock:
        temp = _make_temp()
        read_end, write_end = os.pipe()
        environment = os.environ | {_MARK: mark, _TEMP: temp, _LIFELINE: str(read_end)}
        # The driver holds the lock too, for when this process is killed.
        child = subprocess.Popen(command, env=environment, pass_fds=(read_end, lock.fileno()), start_new_session=True)
        os.close(read_end)
        try:
            return _wait(child, grace_seconds)
        finally:
            os.close(write_end)
            sweep(mark, spare={os.getpid()})
            shutil.rmtree(temp, ignore_errors=True)


@contextmanager
def only_one(lock_file: Path) -> Iterator[IO[str]]:
    """Hold a run's lock; it dies with its last holder, so there is no stale one. Raises: PlacementError when it is held."""
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PlacementError(
                f"another process works on {lock_file.parent}; wait for it to end, or give this run another run.name"
            ) from None
        yield lock


def _make_temp() -> str:
    """Ray puts Unix sockets about 65 characters below it, and a socket's path ends at 107: /tmp where TMPDIR is deep."""
    deep = len(tempfile.gettempdir()) + len("/kdscale-12345678") > _LONGEST_TEMP
    return tempfile.mkdtemp(prefix="kdscale-", dir="/tmp" if deep else None)


def _wait(child: "subprocess.Popen[bytes]", grace_seconds: float) -> int:
    asked = threading.Event()

    def ask(signum: int, frame: FrameType | None) -> None:
        if not asked.is_set():
            asked.set()
            child.terminate()
        else:
            child.kill()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while child.poll() is None and not asked.wait(0.1):
            pass
        deadline = time.monotonic() + grace_seconds + 1.0
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if child.poll() is None:
            _LOG.warning("the driver did not leave within %g s of grace; killing it", grace_seconds)
            child.kill()
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked.is_set():
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


# ---- inside the driver ----


def temp_dir() -> str | None:
    """The run's temporary directory, which the supervisor removes."""
    return os.environ.get(_TEMP)


def follow_supervisor(grace_seconds: float) -> None:
    """Ask this process to stop when its supervisor is gone, and sweep in its place once the grace is over."""
    if _LIFELINE not in os.environ:
        return
    lifeline, mark = int(os.environ[_LIFELINE]), os.environ[_MARK]

    def watch() -> None:
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
        if os.getppid() == 1 and (temp := temp_dir()):
            shutil.rmtree(temp, ignore_errors=True)
