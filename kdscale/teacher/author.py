"""A replica that writes text instead of serving targets, through its generations."""

import threading

from ray.util.placement_group import PlacementGroup

from kdscale import log
from kdscale.cluster.restarts import Restarts
from kdscale.config.sections import GenerateSection
from kdscale.errors import TeacherError
from kdscale.spec import Continuation, Prompt, Sampling
from kdscale.teacher.replica import ReplicaSetup
from kdscale.teacher.service import TeacherReplica

_LOG = log.get(__name__)


class Author:
    """A replica that writes; built when it is first needed, and again when it is lost."""

    def __init__(
        self,
        setup: ReplicaSetup,
        group: PlacementGroup,
        name: str,
        section: GenerateSection,
        sampling: Sampling,
        stop: threading.Event,
    ) -> None:
        """``stop``, once set, ends the batch in hand."""
        teacher = setup.teacher
        self._sampling = sampling
        self._rows, self._limit_s = section.batch_rows, section.batch_seconds
        self._setup, self._group, self._name, self._stop = setup, group, name, stop
        self._restarts = Restarts(teacher.restarts, teacher.restart_wait_seconds, teacher.restart_forget_seconds)
        self._replica: TeacherReplica | None = None
        self._generation = 0

    def write(self, batch: list[Prompt]) -> list[Continuation]:
        """Continuations in the batch's order. Raises: TeacherError when no restart is left."""
        shares = [batch[start : start + self._rows] for start in range(0, len(batch), self._rows)]
        shares += [[] for _ in range(self._setup.teacher.ranks - len(shares))]
        while True:
            try:
                written = self._built().generate(shares, self._sampling, self._limit_s, self._stop)
                # Not before: a batch that comes to nothing may take longer than a life that is long enough.
                self._restarts.serves()
                return [one for share in written for one in share]
            except TeacherError as fault:
                self.kill()
                if self._stop.is_set() or not self._restarts.spend():
                    raise TeacherError(
                        f"{fault}; no restart is left (teacher.restarts = {self._restarts.allowed})"
                    ) from None
                _LOG.warning("%s of the teacher is lost (%s): %s", self._name, self._restarts, fault)
                self._stop.wait(self._restarts.wait_s)

    def _built(self) -> TeacherReplica:
        if self._replica is None:
            self._replica = TeacherReplica(self._setup, self._group, self._name, self._generation)
            self._generation += 1
            self._replica.begin()
            self._replica.built()
        return self._replica

    def kill(self) -> None:
        if self._replica is not None:
            self._replica.kill()
            self._replica = None
