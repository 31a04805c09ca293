"""One generation of the teacher: started, watched, stopped as one unit. ``guard.py`` makes the next one."""

import threading
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup

from kdscale import log
from kdscale.cluster.placement import Ask
from kdscale.cluster.ranks import Heartbeats, RankGroup, form_group
from kdscale.config.sections import TeacherSection
from kdscale.errors import TeacherError
from kdscale.spec import Sampling
from kdscale.stream.directory import Registry
from kdscale.stream.protocol import Endpoint
from kdscale.teacher.counters import NOTHING_YET, Beat, Counters
from kdscale.teacher.replica import ReplicaSetup, TeacherRank

if TYPE_CHECKING:
    from kdscale.spec import Continuation, Prompt

_LOG = log.get(__name__)
_STARTING = "teacher.start_seconds"
_BEAT_S = 0.5
# A rank that dies takes the forward of the others with it: wait so long for all of them, to name the one that died.
_AFTERMATH_S = 0.5


def teacher_ask(teacher: TeacherSection) -> Ask:
    return Ask("teacher", teacher.ranks, teacher.cpus_per_rank, teacher.gpus_per_rank, teacher.placement, teacher.nodes)


class TeacherReplica:
    """One replica: N ranks, one engine, one failure unit."""

    def __init__(
        self,
        setup: ReplicaSetup,
        group: PlacementGroup,
        name: str = "replica-0",
        generation: int = 0,
        before: list[Counters] | None = None,
    ) -> None:
        """``before``: the ``counters`` of the generation it replaces."""
        self._setup = setup
        self.name = name
        self.generation = generation
        self.counters = before or [NOTHING_YET] * setup.teacher.ranks
        """By rank, as of its last heartbeat; so is ``in_flight``."""
        self.in_flight = [0] * setup.teacher.ranks
        self._ranks = RankGroup(TeacherRank, teacher_ask(setup.teacher), group, TeacherError)
        self._serving: list[Any] = []

    def begin(self) -> None:
        """Form the group and let every rank load, without waiting for the end of it. Raises: TeacherError."""
        teacher = self._setup.teacher
        self._ranks.locate(teacher.start_seconds, _STARTING)
        self._heartbeats = Heartbeats(self._ranks)
        longest_s = max(teacher.load_seconds, teacher.forward_seconds)
        form_group(
            *(self._ranks, self._setup.network, self._setup.keys, teacher.start_seconds, _STARTING),
            *(longest_s, teacher.gpus_per_rank, self._listen),
        )
        _LOG.info("%s of the teacher loads (generation %d)", self.name, self.generation)
        self._building = [actor.build.remote(self._setup) for actor in self._ranks.actors]

    def _listen(self) -> None:
        """While the replica starts. Raises: TeacherError for a rank that is dead or silent."""
        self._heartbeats.answers(self._setup.teacher.load_heartbeat_seconds, "teacher.load_heartbeat_seconds")

    def open(self, directory: Registry) -> None:
        """Wait until every rank is built, start serving, and publish the endpoints.

        Raises:
            TeacherError: a rank failed, fell silent, or was not ready within ``teacher.load_seconds``.
        """
        built = self.built()
        ranks, first = self._ranks, self._ranks.actors[0]
        limit_s = self._setup.teacher.start_seconds
        opening = [first.open_sequencer.remote()]
        sequencer = ranks.gather(opening, "open_sequencer", limit_s, _STARTING, self._listen)[0]
        addresses = ranks.all(
            *("open_endpoint", sequencer, self.name, self.generation, self.counters),
            timeout_s=limit_s,
            setting=_STARTING,
            meanwhile=self._listen,
        )
        self._serving = [actor.serve.remote() for actor in self._ranks.actors]
        endpoints = [Endpoint(self.name, self.generation, rank, one) for rank, one in enumerate(addresses)]
        directory.publish(self.name, endpoints)
        _LOG.info(
            "teacher serves at %s (generation %d): %.1f M parameters, %s M per rank, %s",
            ", ".join(addresses),
            self.generation,
            built[0]["parameters"] / 1e6,
            " + ".join(f"{one['parameters_held'] / 1e6:.1f}" for one in built),
            built[0]["dtype"],
        )

    def built(self) -> list[dict[str, Any]]:
        """Wait until every rank is built; returns their facts. Raises: TeacherError."""
        limit_s = self._setup.teacher.load_seconds
        built = self._ranks.gather(self._building, "build", limit_s, "teacher.load_seconds", self._listen)
        _require_sharded(built[0]["parameters"], [one["parameters_held"] for one in built])
        return built

    def generate(
        self, shares: "list[list[Prompt]]", sampling: Sampling, limit_s: float, stopping: threading.Event
    ) -> "list[list[Continuation]]":
        """Continuations of one batch, by rank; the group is built and does not serve.

        Raises:
            TeacherError: a rank died, failed, fell silent, or took longer than ``limit_s`` (``generate.batch_seconds``); also
                when ``stopping`` is set.
        """

        def watch() -> None:
            self._heartbeats.answers(self._setup.teacher.heartbeat_seconds, "teacher.heartbeat_seconds")
            if stopping.is_set():
                raise TeacherError(f"{self.name} was stopped while it was writing")

        calls = [
            actor.generate.remote(share, sampling) for actor, share in zip(self._ranks.actors, shares, strict=True)
        ]
        return self._ranks.gather(calls, "generate", limit_s, "generate.batch_seconds", watch)

    def watch(self, stopping: threading.Event) -> None:
        """Return when ``stopping`` is set.

        Raises:
            TeacherError: a rank died, failed, fell silent, or hangs in a forward.
        """
        teacher = self._setup.teacher
        while not stopping.wait(_BEAT_S):
            if ray.wait(self._serving, timeout=0)[0]:
                raise self._fault()
            beats = self._heartbeats.answers(teacher.heartbeat_seconds, "teacher.heartbeat_seconds")
            for rank, beat in beats.items():
                # None was answered before the rank began to serve.
                if beat is not None:
                    self._take(rank, beat)

    def _take(self, rank: int, beat: Beat) -> None:
        self.counters[rank] = beat.counters
        self.in_flight[rank] = beat.in_flight
        limit_s = self._setup.teacher.forward_seconds
        if beat.forward_seconds > limit_s:
            raise TeacherError(
                f"teacher, rank {rank} hangs in forward {beat.counters.forwards}, which has run for"
                f" {beat.forward_seconds:.1f} s (teacher.forward_seconds = {limit_s:g})"
            )

    def _fault(self) -> TeacherError:
        """What became of the ranks that serve no more."""
        ended, _ = ray.wait(self._serving, num_returns=len(self._serving), timeout=_AFTERMATH_S)
        faults = []
        for rank in sorted(self._serving.index(call) for call in ended):
            try:
                self._ranks.result(self._serving[rank], rank, "serve")
                faults.append(f"teacher, rank {rank} stopped serving")
            except TeacherError as error:
                faults.append(str(error))
        return TeacherError("; ".join(faults))

    def kill(self) -> None:
        """End at once: nobody waits for an answer any more."""
        self._serving = []
        self._ranks.kill()

    def stop(self, limit_s: float = 3.0) -> None:
        """End after the forward in progress, and kill what does not."""
        if self._serving:
            self._ranks.actors[0].stop.remote()
            ray.wait(self._serving, num_returns=len(self._serving), timeout=limit_s)
        self._ranks.kill()


def _require_sharded(total: int, held: list[int]) -> None:
    """Each rank holds its share of the parameters (padding aside) and no more. Raises: TeacherError."""
    share = total / len(held)
    for rank, parameters in enumerate(held):
        if abs(parameters - share) > 0.01 * share:
            raise TeacherError(
                f"teacher rank {rank} holds {parameters:,} parameters; its share of {total:,} over {len(held)} ranks is"
                f" {share:,.0f}: ZeRO-3 did not shard the model"
            )
