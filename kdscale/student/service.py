"""The student as the driver sees it: started, polled, stopped as one unit."""

import time
from collections.abc import Callable
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup

from kdscale.cluster.placement import Ask
from kdscale.cluster.ranks import Heartbeats, RankGroup, form_group
from kdscale.config.sections import StudentSection
from kdscale.credentials import Keys
from kdscale.engine.settings import topology_of
from kdscale.errors import StudentError
from kdscale.stream.protocol import Access
from kdscale.student.worker import StudentRank, StudentSetup

_STARTING = "student.start_seconds"
_BEATING = "student.heartbeat_seconds"
_AFTER_DEATH_S = 3.0


def student_ask(student: StudentSection) -> Ask:
    ranks = topology_of(student.parallel).world
    return Ask("student", ranks, student.cpus_per_rank, student.gpus_per_rank, student.placement, student.nodes)


class StudentGroup:
    """All student ranks: one process group, one DeepSpeed engine."""

    def __init__(self, setup: StudentSetup, group: PlacementGroup, keys: Keys | None) -> None:
        """``keys``: with which the ranks find each other; none: plainly, on loopback."""
        self._keys = keys
        self._setup = setup
        self._student = setup.config.student
        self._ranks = RankGroup(StudentRank, student_ask(self._student), group, StudentError)
        self.running: list[Any] = []
        self._asked_to_stop = False
        self._lost = False

    def begin(self, meanwhile: Callable[[], None]) -> None:
        """Form the group and let every rank build, without waiting for the end of it. What ``meanwhile``, called twice a
        second, raises ends the wait. Raises: StudentError."""
        limit_s = self._student.start_seconds
        self._ranks.locate(limit_s, _STARTING, meanwhile)
        self._heartbeats = Heartbeats(self._ranks)

        def listen() -> None:
            self.events()
            meanwhile()

        network = self._setup.config.stream.network
        gpus = self._student.gpus_per_rank
        form_group(self._ranks, network, self._keys, limit_s, _STARTING, self._student.collective_seconds, gpus, listen)
        self._building = [actor.build.remote(self._setup) for actor in self._ranks.actors]
        self._build_deadline = time.monotonic() + limit_s

    def built(self) -> dict[str, Any] | None:
        """Rank 0's facts once every rank is built, none before. Raises: StudentError, or the error a rank raised."""
        ended, left = ray.wait(self._building, num_returns=len(self._building), timeout=0)
        facts = {
            rank: self._ranks.result(self._building[rank], rank, "build") for rank in map(self._building.index, ended)
        }
        if left and time.monotonic() > self._build_deadline:
            raise StudentError(
                f"student: rank(s) {sorted(map(self._building.index, left))} were not built within"
                f" {_STARTING} = {self._student.start_seconds:g}"
            )
        return None if left else facts[0]

    def start(self, method: Literal["run", "evaluate"], access: Access | None) -> None:
        """Let every rank train, or measure only; the calls are in ``running``."""
        self.running = [getattr(actor, method).remote(access) for actor in self._ranks.actors]

    def result(self, call: Any) -> dict[str, Any]:
        """A ``running`` call's report. Raises: StudentError, or the error the rank raised."""
        return self._ranks.result(call, self.running.index(call), "run")

    def events(self) -> list[dict[str, Any]]:
        """What rank 0 has reported since the last call. Raises: StudentError for a rank that is dead or silent."""
        try:
            beats = self._heartbeats.answers(self._student.heartbeat_seconds, _BEATING)
        except StudentError:
            self._lost = True
            raise
        return beats.get(0, [])

    def last_events(self) -> list[dict[str, Any]]:
        """What is left to report after the last result. Raises: StudentError."""
        calls = [self._heartbeats.owed(0), self._ranks.actors[0].beat.remote()]
        limit_s = self._student.heartbeat_seconds
        return [event for call in calls for event in self._ranks.gather([call], "beat", limit_s, _BEATING)[0]]

    def ask_to_stop(self) -> None:
        self._asked_to_stop = True
        for actor in self._ranks.actors:
            actor.stop.remote()

    def kill(self) -> None:
        """End every rank. A checkpoint that is being written gets the grace first, unless a stop has used it up."""
        if self.running and not self._asked_to_stop:
            grace_s = self._setup.config.cluster.grace_seconds
            # A rank that is dead or silent has left its share or never will: the others only have to find out.
            self._settle(min(grace_s, _AFTER_DEATH_S) if self._lost else grace_s)
        self._ranks.kill()

    def _settle(self, limit_s: float) -> None:
        pending = [actor.settle.remote(limit_s) for actor in self._ranks.actors]
        deadline = time.monotonic() + limit_s
        while pending and (left_s := deadline - time.monotonic()) > 0:
            ready, pending = ray.wait(pending, timeout=left_s)
            for call in ready:
                try:
                    ray.get(call)
                except RayActorError:
                    # As above.
                    deadline = min(deadline, time.monotonic() + _AFTER_DEATH_S)
