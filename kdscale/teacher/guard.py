"""Keeps a replica serving: a lost generation is killed whole and built again in its place, beside the driver's loop."""

import itertools
import queue
import threading

from ray.util.placement_group import PlacementGroup

from kdscale import log
from kdscale.cluster.restarts import Restarts
from kdscale.errors import KdscaleError, TeacherError
from kdscale.stream.directory import Registry
from kdscale.teacher.replica import ReplicaSetup
from kdscale.teacher.service import TeacherReplica

_LOG = log.get(__name__)
_JOIN_S = 5.0


class ReplicaGuard:
    """One replica through its generations, in a thread of its own that starts, watches and rebuilds them.

    A TeacherError, wherever a generation had come to, costs one of ``teacher.restarts``. Any other KdscaleError (a model
    directory that is not there) would come again, and ends the watch.
    """

    def __init__(self, setup: ReplicaSetup, group: PlacementGroup, registry: Registry, name: str = "replica-0") -> None:
        self.name = name
        self.served = False
        """Whether a generation has served yet."""
        self._fault: KdscaleError | None = None
        teacher = setup.teacher
        self._restarts = Restarts(teacher.restarts, teacher.restart_wait_seconds, teacher.restart_forget_seconds)
        self._setup = setup
        self._group = group
        self._registry = registry
        self._replica: TeacherReplica | None = None
        self._phases: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stopping = threading.Event()
        # Held while a generation's actors are made, so that ``stop`` misses none.
        self._making = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"guard-{name}")

    def start(self) -> None:
        """Let the first generation load, without waiting for it."""
        self._thread.start()

    @property
    def fault(self) -> KdscaleError | None:
        """The fault after which no generation follows; none while there is hope."""
        if self._thread.is_alive() or self._stopping.is_set():
            return None
        return self._fault or TeacherError(f"the thread that watches {self.name} has ended; see the traceback above")

    @property
    def in_flight(self) -> int:
        """Requests the replica has in hand, as of its last heartbeats."""
        return sum(self._replica.in_flight) if self._replica is not None else 0

    def phases(self) -> list[str]:
        """What happened since the last call, for the person who watches."""
        happened = []
        while not self._phases.empty():
            happened.append(self._phases.get())
        return happened

    def stop(self, *, at_once: bool = False) -> None:
        """End whatever generation there is, and the watch; serving ends after the forward in progress, if not at once."""
        with self._making:
            self._stopping.set()
        if self._replica is not None:
            if at_once:
                self._replica.kill()
            else:
                self._replica.stop()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    # ---- in the thread ----

    def _run(self) -> None:
        try:
            for generation in itertools.count():
                try:
                    self._serve(generation)
                    return
                except KdscaleError as fault:
                    if self._stopping.is_set() or not self._lost(fault):
                        return
                self._stopping.wait(self._restarts.wait_s)
        finally:
            self._registry.withdraw(self.name, rebuilding=False)

    def _serve(self, generation: int) -> None:
        """Build a generation, publish it, and watch it until ``stop``. Raises: KdscaleError."""
        before = self._replica.counters if self._replica is not None else None
        with self._making:
            if self._stopping.is_set():
                return
            self._replica = TeacherReplica(self._setup, self._group, self.name, generation, before)
        self._replica.begin()
        self._replica.open(self._registry)
        self.served = True
        self._restarts.serves()
        if generation > 0:
            self._phases.put(f"{self.name} of the teacher serves again (generation {generation})")
        self._replica.watch(self._stopping)

    def _lost(self, fault: KdscaleError) -> bool:
        """Kill what is left of the generation; whether another one follows."""
        again = isinstance(fault, TeacherError) and self._restarts.spend()
        self._registry.withdraw(self.name, rebuilding=again)
        if again:
            _LOG.warning("%s of the teacher is lost: %s", self.name, fault)
            wait_s = self._restarts.wait_s
            self._phases.put(f"rebuilding {self.name} of the teacher ({self._restarts}) after {wait_s:g} s")
        else:
            spent = f"; no restart is left (teacher.restarts = {self._restarts.allowed})"
            self._fault = type(fault)(f"{fault}{spent if isinstance(fault, TeacherError) else ''}")
            self._phases.put(f"{self.name} of the teacher is lost for good: {self._fault}")
        if self._replica is not None:
            self._replica.kill()
        return again
