"""Keeps a teacher serving: a lost generation is killed whole and built again in its place, beside the driver's loop."""

import queue
import threading
from typing import Any

from ray.util.placement_group import PlacementGroup

from kdscale import log
from kdscale.errors import KdscaleError, TeacherError
from kdscale.stream.directory import DirectoryServer
from kdscale.teacher.replica import ReplicaSetup
from kdscale.teacher.service import TeacherReplica

_LOG = log.get(__name__)
_LONGEST_WAIT_S = 60.0
_JOIN_S = 5.0


def wait_before(restart: int, first_wait_s: float) -> float:
    """Seconds before restart ``restart`` (from 1): doubles from ``first_wait_s``, 60 s at most."""
    return min(_LONGEST_WAIT_S, first_wait_s * 2.0 ** min(restart - 1, 60))


class TeacherGuard:
    """One replica through its generations.

    The first generation starts in the caller's thread and is not tried again: what cannot start once is a matter of the
    configuration or the machine. Once it serves, a thread watches it. A TeacherError there or in a rebuild costs one of
    ``teacher.restarts``; any other KdscaleError (a model directory that is gone) would come again, and ends the watch.
    """

    def __init__(self, setup: ReplicaSetup, group: PlacementGroup, directory: DirectoryServer) -> None:
        self._setup = setup
        self._group = group
        self._directory = directory
        self._replica = TeacherReplica(setup, group)
        self._phases: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._fault: KdscaleError | None = None
        # Held while a generation's actors are made, so that ``stop`` misses none.
        self._making = threading.Lock()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="teacher-guard")

    def begin(self) -> None:
        """Let the first generation load, without waiting for the end of it. Raises: TeacherError."""
        self._replica.begin()

    def open(self) -> None:
        """Wait until the first generation serves, and watch it from here on. Raises: TeacherError."""
        self._replica.open(self._directory)
        self._thread.start()

    def events(self) -> list[dict[str, Any]]:
        """What happened since the last call. Raises: the fault after which no generation follows."""
        if not self._thread.is_alive() and not self._stopping.is_set():
            raise self._fault or TeacherError("the thread that watches the teacher has ended; see the traceback above")
        happened = []
        while not self._phases.empty():
            happened.append({"kind": "phase", "phase": self._phases.get()})
        return happened

    def stop(self, *, at_once: bool = False) -> None:
        """End whatever generation there is, and the watch; serving ends after the forward in progress, if not at once."""
        with self._making:
            self._stopping.set()
        if at_once:
            self._replica.kill()
        else:
            self._replica.stop()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    # ---- in the thread ----

    def _keep(self) -> None:
        restart = 0
        while not self._stopping.is_set():
            try:
                if restart > 0:
                    self._rebuild(restart)
                self._replica.watch(self._stopping)
            except KdscaleError as fault:
                if self._stopping.is_set():
                    return
                restart += 1
                if not self._lost(fault, restart):
                    return

    def _lost(self, fault: KdscaleError, restart: int) -> bool:
        """Kill what is left of the generation; whether restart ``restart`` follows."""
        allowed = self._setup.teacher.restarts
        again = isinstance(fault, TeacherError) and restart <= allowed
        self._directory.withdraw(self._replica.name, rebuilding=again)
        if again:
            _LOG.warning("teacher lost: %s; restart %d of %d", fault, restart, allowed)
            self._phases.put(f"rebuilding the teacher (restart {restart} of {allowed})")
        elif isinstance(fault, TeacherError):
            self._fault = TeacherError(f"{fault}; no restart is left (teacher.restarts = {allowed})")
        else:
            self._fault = fault
        self._replica.kill()
        return again

    def _rebuild(self, restart: int) -> None:
        """The next generation, published. Raises: KdscaleError."""
        wait_s = wait_before(restart, self._setup.teacher.restart_wait_seconds)
        _LOG.info("teacher: restart %d waits %g s (teacher.restart_wait_seconds)", restart, wait_s)
        if self._stopping.wait(wait_s):
            return
        with self._making:
            if self._stopping.is_set():
                return
            self._replica = TeacherReplica(
                self._setup, self._group, self._replica.name, self._replica.generation + 1, self._replica.counters
            )
        self._replica.begin()
        self._replica.open(self._directory)
        self._phases.put(f"the teacher serves again (generation {self._replica.generation})")
