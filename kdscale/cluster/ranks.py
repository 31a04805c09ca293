"""N Ray actors that form one process group, watched as one failure unit."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from kdscale.cluster.placement import Ask
from kdscale.credentials import Keys
from kdscale.errors import KdscaleError
from kdscale.node import rank_environment

# Clocks that tell when a process started differ by less, and no pid is used again as fast.
_SAME_START_S = 2.0
_LEAVE_S = 1.0
_GONE_S = 5.0
_POLL_S = 0.5


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    node: str
    pid: int
    started: float
    """Seconds since the epoch: tells a process from a later one with its pid."""


def _place(actor: Any) -> Place:
    """Runs in an actor: where it is."""
    me = psutil.Process()
    return Place(ray.get_runtime_context().get_node_id(), os.getpid(), me.create_time())


class RankGroup:
    """Actors of one class, one per bundle of a placement group, in rank order."""

    def __init__(self, actor_class: type, ask: Ask, group: PlacementGroup, fault: type[KdscaleError]) -> None:
        self.what = ask.what
        self.fault = fault
        env = rank_environment(ask.cpus_per_rank, ask.gpus_per_rank)
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

    def locate(self, timeout_s: float, setting: str, meanwhile: Callable[[], Any] | None = None) -> None:
        """Wait until every rank is a process, and learn which are of this node, so that ``kill`` can end a stopped one; the rest
        is as in ``gather``. Raises: the group's fault."""
        this_node = ray.get_runtime_context().get_node_id()
        calls = [actor.__ray_call__.remote(_place) for actor in self.actors]
        for place in self.gather(calls, "start", timeout_s, setting, meanwhile):
            if place.node != this_node:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(place.pid)
                if abs(process.create_time() - place.started) < _SAME_START_S:
                    self._on_this_node.append(process)

    def all(
        self,
        method: str,
        *args: Any,
        timeout_s: float,
        setting: str,
        meanwhile: Callable[[], Any] | None = None,
    ) -> list[Any]:
        """Call ``method`` on every rank and ``gather`` the answers. Raises: the group's fault, naming the rank."""
        calls = [getattr(actor, method).remote(*args) for actor in self.actors]
        return self.gather(calls, method, timeout_s, setting, meanwhile)

    def gather(
        self,
        calls: list[Any],
        method: str,
        timeout_s: float,
        setting: str,
        meanwhile: Callable[[], Any] | None = None,
    ) -> list[Any]:
        """The answers to one call per rank, all within ``timeout_s`` (``setting`` names it); the first rank that fails ends the
        wait. ``meanwhile`` is called twice a second, and what it raises ends the wait too."""
        left = dict(zip(calls, range(len(calls)), strict=True))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while left:
            wait_s = max(0.0, deadline - time.monotonic())
            ready, _ = ray.wait(list(left), num_returns=1, timeout=min(_POLL_S, wait_s) if meanwhile else wait_s)
            if ready:
                rank = left.pop(ready[0])
                answers[rank] = self.result(ready[0], rank, method)
            elif time.monotonic() >= deadline:
                raise self.fault(
                    f"{self.what}: rank(s) {sorted(left.values())} did not answer {method!r} within"
                    f" {setting} = {timeout_s:g}"
                )
            if meanwhile is not None:
                meanwhile()
        return [answers[rank] for rank in sorted(answers)]

    def result(self, call: Any, rank: int, method: str) -> Any:
        """The answer of a call that has ended; a dead actor or its exception becomes the group's fault."""
        try:
            return ray.get(call, timeout=60)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, KdscaleError):
                raise type(cause)(f"{self.what}, rank {rank}: {cause}") from None
            raise self.fault(f"{self.what}, rank {rank} failed in {method!r}: {error}") from None
        except (RayActorError, GetTimeoutError) as error:
            raise self.fault(f"{self.what}, rank {rank} died in {method!r}: {str(error).splitlines()[0]}") from None
        except RayError as error:
            raise self.fault(f"{self.what}, rank {rank}: {error}") from None

    def kill(self) -> None:
        """End every rank. Returns when those located on this node are gone."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        # Ray waits 5 s for the answer of a process that is stopped.
        left = _wait_gone(self._on_this_node, _LEAVE_S)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _wait_gone(left, _GONE_S)


def _wait_gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Those that still live after ``timeout_s``. One that Ray has not reaped yet is dead all the same."""
    deadline = time.monotonic() + timeout_s
    while (left := [one for one in processes if _lives(one)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Heartbeats:
    """One open question to every rank, asked again once it is answered. The actor class has ``beat``, which a thread beside
    the working one answers: long work is no silence."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._asked: dict[Any, tuple[int, float]] = {}
        for rank in range(len(group.actors)):
            self._ask(rank)

    def _ask(self, rank: int) -> None:
        self._asked[self._group.actors[rank].beat.remote()] = (rank, time.monotonic())

    def owed(self, rank: int) -> Any:
        """The open question to ``rank``."""
        return next(call for call, (asked, _) in self._asked.items() if asked == rank)

    def answers(self, limit_s: float, setting: str) -> dict[int, Any]:
        """What ranks have answered since the last call, by rank.

        Raises: the group's fault for a rank that is dead, or has owed an answer for ``limit_s`` (``setting`` names it).
        """
        answered, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
        answers = {}
        for call in answered:
            rank, _ = self._asked.pop(call)
            answers[rank] = self._group.result(call, rank, "beat")
            self._ask(rank)
        for rank, since in self._asked.values():
            silent_s = time.monotonic() - since
            if silent_s > limit_s:
                raise self._group.fault(
                    f"{self._group.what}, rank {rank} has not answered for {silent_s:.1f} s ({setting} = {limit_s:g})"
                )
        return answers


def form_group(
    group: RankGroup,
    network: str,
    keys: Keys | None,
    timeout_s: float,
    setting: str,
    collective_s: float,
    gpus_per_rank: int,
    meanwhile: Callable[[], Any] | None = None,
) -> None:
    """Let every rank join one process group, within ``timeout_s`` (``setting`` names it), whose store rank 0 opens to who has
    ``keys`` and whose collectives may take ``collective_s``. The actor class has ``open_store`` and ``join``."""
    opening = group.actors[0].open_store.remote(network, keys)
    address = group.gather([opening], "open_store", timeout_s, setting, meanwhile)[0]
    group.all(
        *("join", address, network, keys, timeout_s, collective_s, gpus_per_rank),
        timeout_s=timeout_s,
        setting=setting,
        meanwhile=meanwhile,
    )
