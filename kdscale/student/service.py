"""The student as the driver sees it: started, polled, stopped as one unit."""

import time
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup

from kdscale.cluster.placement import Ask
from kdscale.cluster.ranks import RankGroup, form_group
from kdscale.config.schema import StudentSection
from kdscale.engine.settings import topology_of
from kdscale.errors import StudentError
from kdscale.stream.protocol import Access
from kdscale.student.worker import StudentRank, StudentSetup

_AFTER_DEATH_S = 3.0


def student_ask(student: StudentSection) -> Ask:
    return Ask("student", topology_of(student.parallel).world, student.cpus_per_rank, student.gpus_per_rank)


class StudentGroup:
    """All student ranks: one process group, one DeepSpeed engine."""

    def __init__(self, setup: StudentSetup, group: PlacementGroup) -> None:
        self._setup = setup
        student = setup.config.student
        self._limit_s = student.start_seconds
        self._ranks = RankGroup(StudentRank, student_ask(student), group, StudentError)
        self.running: list[Any] = []
        self._asked_to_stop = False

    def begin(self) -> None:
        """Form the group and let every rank build, without waiting for the end of it."""
        student = self._setup.config.student
        form_group(self._ranks, self._setup.config.stream.network, self._limit_s, student.gpus_per_rank)
        self._building = [actor.build.remote(self._setup) for actor in self._ranks.actors]

    def built(self) -> dict[str, Any]:
        """Wait until every rank is built; returns rank 0's facts. Raises: StudentError."""
        return self._ranks.gather(self._building, "build", self._limit_s)[0]

    def start(self, method: Literal["run", "evaluate"], access: Access) -> None:
        """Let every rank train, or measure only; the calls are in ``running``."""
        self.running = [getattr(actor, method).remote(access) for actor in self._ranks.actors]

    def result(self, call: Any) -> dict[str, Any]:
        """A ``running`` call's report. Raises: StudentError, or the error the rank raised."""
        return self._ranks.result(call, self.running.index(call), "run")

    def events(self) -> list[dict[str, Any]]:
        """What rank 0 reports since the last call. Raises: StudentError."""
        return self._ranks.gather([self._ranks.actors[0].events.remote()], "events", 30)[0]

    def ask_to_stop(self) -> None:
        self._asked_to_stop = True
        for actor in self._ranks.actors:
            actor.stop.remote()

    def kill(self) -> None:
        """End every rank. A checkpoint that is being written gets the grace first, unless a stop has used it up."""
        if self.running and not self._asked_to_stop:
            self._settle(self._setup.config.cluster.grace_seconds)
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
                    # A dead rank has left its share or never will: rank 0 only has to find out.
                    deadline = min(deadline, time.monotonic() + _AFTER_DEATH_S)
