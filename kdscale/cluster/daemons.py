"""Ray's own processes on a cluster that a run has started for itself."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

from kdscale.errors import PlacementError

_NEEDED = ("gcs_server", "raylet")
_POLL_S = 0.5


@contextmanager
def watched(lost: Callable[[PlacementError], None]) -> Iterator[None]:
    """For as long as the context lasts, ``lost`` is called when a process has ended without which this cluster is none: once,
    from a thread.

    Left alone, Ray waits a minute for its GCS to come back, which nobody would start again here, and then ends this process
    without a word of what happened; the end of a raylet shows as that of whichever actor is missed first.
    """
    needed = {}
    for one in psutil.Process().children():
        # Ray's short-lived helpers may be gone by now.
        with suppress(psutil.NoSuchProcess):
            if (name := one.name()) in _NEEDED:
                needed[one] = name
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_POLL_S):
            if gone := [name for one, name in needed.items() if _ended(one)]:
                lost(
                    PlacementError(
                        f"Ray's {' and '.join(gone)}, which this run had started for itself, has ended (killed, or out"
                        " of memory?); give the same command again: train, record and generate go on from what they have saved"
                    )
                )
                return

    thread = threading.Thread(target=watch, daemon=True, name="ray-daemons")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _ended(process: psutil.Process) -> bool:
    try:
        # Not yet waited for by Ray, which started it, it is a zombie.
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
