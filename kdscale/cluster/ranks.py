"""N Ray actors that form one process group, watched as one failure unit."""

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kdscale.cluster.placement import Ask
from kdscale.errors import KdscaleError

# Clocks that tell when a process started differ by less, and no pid is used again as fast.
_SAME_START_S = 2.0
_GONE_S = 5.0


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    node: str
    pid: int
    started: float
    """Seconds since the epoch: tells a process from a later one with its pid."""


def here() -> Place:
    """The calling process."""
    me = psutil.Process()
    return Place(ray.get_runtime_context().get_node_id(), os.getpid(), me.create_time())


class RankGroup:
    """Actors of one class, one per bundle of a placement group, in rank order."""

    def __init__(self, actor_class: type, ask: Ask, group: PlacementGroup, fault: type[KdscaleError]) -> None:
        self.what = ask.what
        self._fault = fault
        env = {
            # Spinning threads would take the cores of the other ranks on the node.
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": str(ask.cpus_per_rank),
            "TOKENIZERS_PARALLELISM": "false",
            # Deprecations inside the libraries are no news for users, nor is a progress bar from each rank.
            "PYTHONWARNINGS": "ignore::FutureWarning",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        if not ask.gpus_per_rank:
            env["DS_ACCELERATOR"] = "cpu"
            # glibc hands large blocks back to the kernel at once and faults them in again at the next step, a fifth of a
            # step's time: keep them.
            env |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_ARENA_MAX": "1"}
        # A second call runs beside a rank's long one: asking for figures, or telling it to stop.
        remote: Any = ray.remote(actor_class)
        self.actors: list[Any] = [
            remote.options(
                max_concurrency=4,
                max_restarts=0,
                num_cpus=ask.cpus_per_rank,
                num_gpus=ask.gpus_per_rank,
                runtime_env={"env_vars": env},
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote(rank, ask.ranks)
            for rank in range(ask.ranks)
        ]
        self._on_this_node: list[psutil.Process] = []

    def locate(self, timeout_s: float) -> None:
        """Learn which ranks are processes of this node, so that ``kill`` can end a stopped one. The actor class has
        ``where``. Raises: the group's fault."""
        this_node = here().node
        for place in self.all("where", timeout_s=timeout_s):
            if place.node != this_node:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(place.pid)
                if abs(process.create_time() - place.started) < _SAME_START_S:
                    self._on_this_node.append(process)

    def all(self, method: str, *args: Any, timeout_s: float, **kwargs: Any) -> list[Any]:
        """Call ``method`` on every rank and wait for all answers. Raises: the group's fault, naming the rank."""
        return self.gather([getattr(actor, method).remote(*args, **kwargs) for actor in self.actors], method, timeout_s)

    def gather(self, calls: list[Any], method: str, timeout_s: float) -> list[Any]:
        """The answers to one call per rank, all within ``timeout_s``; the first rank that fails ends the wait."""
        left = dict(zip(calls, range(len(calls)), strict=True))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while left:
            ready, _ = ray.wait(list(left), num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._fault(
                    f"{self.what}: rank(s) {sorted(left.values())} did not answer {method!r} within {timeout_s:g} s"
                )
            rank = left.pop(ready[0])
            answers[rank] = self.result(ready[0], rank, method)
        return [answers[rank] for rank in sorted(answers)]

    def result(self, call: Any, rank: int, method: str) -> Any:
        """The answer of a call that has ended; a dead actor or its exception becomes the group's fault."""
        try:
            return ray.get(call, timeout=60)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, KdscaleError):
                raise type(cause)(f"{self.what}, rank {rank}: {cause}") from None
            raise self._fault(f"{self.what}, rank {rank} failed in {method!r}: {error}") from None
        except (RayActorError, GetTimeoutError) as error:
            raise self._fault(f"{self.what}, rank {rank} died in {method!r}: {str(error).splitlines()[0]}") from None
        except RayError as error:
            raise self._fault(f"{self.what}, rank {rank}: {error}") from None

    def kill(self) -> None:
        """End every rank at once. Returns when those located on this node are gone."""
        # By pid first: Ray asks a process to leave and waits 5 s for the answer of one that is stopped.
        for process in self._on_this_node:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._on_this_node, timeout=_GONE_S)
        for actor in self.actors:
            ray.kill(actor, no_restart=True)


def form_group(group: RankGroup, network: str, timeout_s: float, gpus_per_rank: int) -> None:
    """Let every rank join one process group, whose store rank 0 opens. The actor class has ``open_store`` and ``join``."""
    address = group.gather([group.actors[0].open_store.remote(network)], "open_store", timeout_s)[0]
    group.all("join", address, network, timeout_s, gpus_per_rank, timeout_s=timeout_s)
