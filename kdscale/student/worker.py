"""One student rank: build, check the teacher, measure, train, measure again, export. Ray calls it; it imports no Ray."""

import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdscale import log
from kdscale.config.schema import RunConfig
from kdscale.credentials import Keys
from kdscale.stream.protocol import Access, Known

if TYPE_CHECKING:
    from kdscale.student.job import StudentJob


@dataclass(frozen=True)
class StudentSetup:
    """What every student rank is told."""

    config: RunConfig
    teachers: dict[str, Known]
    """By name, the main one first: its layers are the student's, and its vocabulary is all teachers'."""
    identity: dict[str, Any]
    run_directory: str
    resume_from: str | None
    """Directory of a verified checkpoint; none starts fresh."""
    exchange: str | None = None
    """Directory through which this life of the student tells its weights and gets its own text; none without on_policy."""

    @property
    def teacher(self) -> Known:
        """The main one."""
        return next(iter(self.teachers.values()))


class StudentRank:
    """The actor. Its methods are called in this order: open_store (rank 0), join, build, run; stop, settle and beat at any
    time."""

    def __init__(self, rank: int, world: int) -> None:
        log.setup(f"student {rank}")
        from kdscale.engine import process

        self._member = process.Member(rank, world)
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._job: StudentJob | None = None

    def open_store(self, network: str, keys: Keys | None) -> tuple[str, int]:
        return self._member.open_store(network, keys)

    def join(
        self,
        address: tuple[str, int],
        network: str,
        keys: Keys | None,
        timeout_s: float,
        collective_s: float,
        gpus_per_rank: int,
    ) -> None:
        self._device = self._member.join(address, network, keys, timeout_s, collective_s, gpus_per_rank)

    def build(self, setup: StudentSetup) -> dict[str, Any]:
        """Build the student and its engine, and restore the checkpoint; returns its facts."""
        from kdscale.student.job import StudentJob

        self._job = StudentJob(
            setup, self._member.rank, self._device, emit=self._events.put, should_stop=self._stop.is_set
        )
        return self._job.facts()

    def run(self, access: Access | None) -> dict[str, Any]:
        """Everything from the canary to the export; returns the rank's report."""
        assert self._job is not None
        return self._job.run(access)

    def evaluate(self, access: Access | None) -> dict[str, Any]:
        """Canary and quality of the student as built."""
        assert self._job is not None
        return self._job.evaluate(access)

    def beat(self) -> list[dict[str, Any]]:
        """What happened since the last call. Answered by a thread beside the one that trains: a long step is no silence."""
        happened = []
        while not self._events.empty():
            happened.append(self._events.get())
        return happened

    def settle(self, limit_s: float) -> None:
        """Give a checkpoint that is being written ``limit_s`` to become one, beside whatever else this rank does."""
        if self._job is not None:
            self._job.settle(limit_s)

    def stop(self) -> None:
        """Save and leave at the end of the step in progress."""
        self._stop.set()
