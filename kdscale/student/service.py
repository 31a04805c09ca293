"""The student as the driver sees it: started, polled, stopped as one unit."""

from typing import Any, Literal

from ray.util.placement_group import PlacementGroup

from kdscale.cluster.placement import Ask
from kdscale.cluster.ranks import RankGroup, form_group
from kdscale.config.schema import StudentSection
from kdscale.engine.settings import topology_of
from kdscale.errors import StudentError
from kdscale.stream.protocol import Access
from kdscale.student.worker import StudentRank, StudentSetup


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
        for actor in self._ranks.actors:
            actor.stop.remote()

    def kill(self) -> None:
        self._ranks.kill()
