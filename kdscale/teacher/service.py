"""The teacher as the driver sees it: started, watched, stopped as one unit."""

from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from kdscale import log
from kdscale.cluster.placement import Ask
from kdscale.cluster.ranks import RankGroup, form_group
from kdscale.config.schema import TeacherSection
from kdscale.errors import TeacherError
from kdscale.stream.directory import DirectoryServer
from kdscale.stream.protocol import Endpoint
from kdscale.teacher.replica import ReplicaSetup, TeacherRank

_LOG = log.get(__name__)


def teacher_ask(teacher: TeacherSection) -> Ask:
    return Ask("teacher", teacher.ranks, teacher.cpus_per_rank, teacher.gpus_per_rank)


class TeacherReplica:
    """One replica: N ranks, one engine, one failure unit."""

    def __init__(
        self, setup: ReplicaSetup, group: PlacementGroup, name: str = "replica-0", generation: int = 0
    ) -> None:
        self._setup = setup
        self.name = name
        self._generation = generation
        self._ranks = RankGroup(TeacherRank, teacher_ask(setup.teacher), group, TeacherError)
        self._serving: list[Any] = []

    def begin(self) -> None:
        """Form the group and let every rank load, without waiting for the end of it."""
        limit_s = self._setup.teacher.start_seconds
        form_group(self._ranks, self._setup.network, limit_s, self._setup.teacher.gpus_per_rank)
        self._building = [actor.build.remote(self._setup) for actor in self._ranks.actors]

    def open(self, directory: DirectoryServer) -> None:
        """Wait until every rank is built, start serving, and publish the endpoints.

        Raises:
            TeacherError: a rank failed or was not ready within ``teacher.start_seconds``.
        """
        limit_s = self._setup.teacher.start_seconds
        built = self._ranks.gather(self._building, "build", limit_s)
        total, held = built[0]["parameters"], [one["parameters_held"] for one in built]
        _require_sharded(total, held)
        sequencer = self._ranks.gather([self._ranks.actors[0].open_sequencer.remote()], "open_sequencer", limit_s)[0]
        addresses = self._ranks.all("open_endpoint", sequencer, timeout_s=limit_s)
        self._serving = [actor.serve.remote() for actor in self._ranks.actors]
        endpoints = [Endpoint(self.name, self._generation, rank, one) for rank, one in enumerate(addresses)]
        directory.publish(self.name, endpoints, self._setup.meaning)
        _LOG.info(
            "teacher serves at %s: %.1f M parameters, %s M per rank, %s",
            ", ".join(addresses),
            total / 1e6,
            " + ".join(f"{one / 1e6:.1f}" for one in held),
            built[0]["dtype"],
        )

    @property
    def serving(self) -> list[Any]:
        """One pending call per rank; one that ends before ``stop`` means the replica is lost."""
        return self._serving

    def raise_fault(self, call: Any) -> None:
        """A ``serving`` call has ended. Raises: TeacherError."""
        rank = self._serving.index(call)
        self._ranks.result(call, rank, "serve")
        raise TeacherError(f"teacher, rank {rank} stopped serving")

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
