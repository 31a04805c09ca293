"""The writing ranks as the driver sees them: started, watched, started again where one is lost, beside the driver's loop."""

import queue
import threading
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup

from kdscale import log
from kdscale.cluster.placement import Ask
from kdscale.cluster.ranks import Heartbeats, RankGroup
from kdscale.cluster.restarts import Restarts
from kdscale.config.on_policy import OnPolicySection
from kdscale.errors import KdscaleError, OnPolicyError
from kdscale.on_policy.worker import RolloutRank, RolloutSetup

_LOG = log.get(__name__)
_POLL_S = 0.25
_JOIN_S = 5.0


def rollout_ask(section: OnPolicySection) -> Ask:
    return Ask("rollouts", section.ranks, section.cpus_per_rank, section.gpus_per_rank)


class RolloutGuard:
    """The ranks that write for one life of the student, through their own lives.

    An OnPolicyError costs one of ``on_policy.restarts``; any other KdscaleError would come again, and ends the watch.
    """

    def __init__(self, setup: RolloutSetup, group: PlacementGroup) -> None:
        section = setup.config.on_policy
        assert section is not None
        self._setup, self._section, self._group = setup, section, group
        self._restarts = Restarts(section.restarts, section.restart_wait_seconds, section.restart_forget_seconds)
        self._ranks: RankGroup | None = None
        self._fault: KdscaleError | None = None
        self._phases: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stopping = threading.Event()
        # Held while actors are made, so that ``stop`` misses none.
        self._making = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="guard-rollouts")

    def start(self) -> None:
        """Let the ranks build and write, without waiting for them."""
        self._thread.start()

    def events(self) -> list[dict[str, Any]]:
        """What happened since the last call. Raises: the fault after which no rank is started again."""
        happened = []
        while not self._phases.empty():
            happened.append({"kind": "phase", "phase": self._phases.get()})
        if not self._thread.is_alive() and not self._stopping.is_set():
            raise self._fault or OnPolicyError("the thread that watches who writes has ended; see the traceback above")
        return happened

    def stop(self) -> None:
        with self._making:
            self._stopping.set()
        if self._ranks is not None:
            self._ranks.kill()
        self._thread.join(_JOIN_S)

    # ---- in the thread ----

    def _run(self) -> None:
        while True:
            try:
                self._live()
                return
            except KdscaleError as fault:
                if self._stopping.is_set() or not self._lost(fault):
                    return
            self._stopping.wait(self._restarts.wait_s)

    def _lost(self, fault: KdscaleError) -> bool:
        """Kill what is left; whether ranks are started again."""
        assert self._ranks is not None
        self._ranks.kill()
        if not isinstance(fault, OnPolicyError):
            self._fault = fault
            return False
        if not self._restarts.spend():
            self._fault = OnPolicyError(f"{fault}; no restart is left (on_policy.restarts = {self._restarts.allowed})")
            return False
        _LOG.warning("who writes the student's text is lost: %s", fault)
        self._phases.put(f"starting who writes again ({self._restarts}) after {self._restarts.wait_s:g} s")
        return True

    def _live(self) -> None:
        """One life of the ranks. Raises: KdscaleError."""
        limit_s = self._section.start_seconds
        with self._making:
            if self._stopping.is_set():
                return
            ranks = RankGroup(RolloutRank, rollout_ask(self._section), self._group, OnPolicyError)
            self._ranks = ranks
        setting = "on_policy.start_seconds"
        ranks.locate(limit_s, setting, self._require_wanted)
        ranks.all("build", self._setup, timeout_s=limit_s, setting=setting, meanwhile=self._require_wanted)
        self._restarts.serves()
        heartbeats = Heartbeats(ranks)
        writing = {actor.write.remote(): rank for rank, actor in enumerate(ranks.actors)}
        while not self._stopping.wait(_POLL_S):
            heartbeats.answers(self._section.heartbeat_seconds, "on_policy.heartbeat_seconds")
            ended, _ = ray.wait(list(writing), num_returns=len(writing), timeout=0) if writing else ([], [])
            for call in ended:
                ranks.result(call, writing.pop(call), "write")

    def _require_wanted(self) -> None:
        """Raises: OnPolicyError when nobody waits for the ranks any more."""
        if self._stopping.is_set():
            raise OnPolicyError("stopped while who writes was starting")
