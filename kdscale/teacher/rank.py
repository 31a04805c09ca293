"""One teacher rank between its Flight threads and its forward thread. No Ray.

Flight threads ``submit`` work and wait for the answer; the forward thread runs ``serve``, doing what the sequencer deals.
"""

import itertools
import queue
import threading
import time
from dataclasses import asdict
from typing import Any

from kdscale import log
from kdscale.batch import Batch
from kdscale.errors import KdscaleError, TeacherError
from kdscale.stream.protocol import Header
from kdscale.stream.server import Answer
from kdscale.teacher.counters import NOTHING_YET, Counters
from kdscale.teacher.lockstep import LockstepClient
from kdscale.teacher.model import FetchHead, Score, TeacherModel, Work

_LOG = log.get(__name__)


class RankScorer:
    """The ``Scorer`` behind a rank's Flight server."""

    def __init__(
        self,
        rank: int,
        model: TeacherModel,
        lockstep: LockstepClient,
        facts: dict[str, Any],
        before: Counters = NOTHING_YET,
    ) -> None:
        """``before``: what this rank had done in earlier generations of its replica."""
        self._rank = rank
        self._facts = facts
        self._model = model
        self._lockstep = lockstep
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[Work, queue.SimpleQueue[Answer]]] = {}
        self.counters = before
        """Replaced as a whole after each forward, so any thread may read it."""
        self._forward_began: float | None = None

    def submit(self, request: str, batch: Batch | None, header: Header | None) -> "queue.SimpleQueue[Answer]":
        work: Work = FetchHead() if batch is None or header is None else Score(batch, header.spec)
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        if isinstance(work, Score) and (fault := self._model.refusal(work.spec)) is not None:
            # Of this request alone: a forward that fails ends the whole group.
            answers.put(fault)
            return answers
        with self._lock:
            number = next(self._numbers)
            self._pending[number] = (work, answers)
        self._lockstep.ring(number, *(batch.work if batch is not None else (0, 0)))
        return answers

    def progress(self) -> int:
        return self.counters.forwards + self._model.blocks_run

    def forward_seconds(self) -> float:
        """How long the forward in progress has run; 0 between forwards."""
        began = self._forward_began
        return 0.0 if began is None else time.monotonic() - began

    def stats(self) -> dict[str, Any]:
        """The counters, with the facts of the build."""
        return self._facts | {"rank": self._rank} | asdict(self.counters)

    def serve(self) -> None:
        """Run forwards until the sequencer closes.

        Raises:
            TeacherError: a forward failed. The group is one failure unit: its ranks are out of step from here on.
        """
        while (forward := self._lockstep.next_forward()) is not None:
            self._forward_began = time.monotonic()
            with self._lock:
                jobs = [self._pending.pop(number) for number in forward.shares[self._rank]]
            try:
                answers = self._model.forward([work for work, _ in jobs])
            except (RuntimeError, KdscaleError) as error:
                fault = TeacherError(f"rank {self._rank} failed in forward {forward.number}: {error}")
                for _, out in jobs:
                    out.put(fault)
                raise fault from error
            # Before the answers: who has one may look what it took.
            self._count([work for work, _ in jobs])
            for (_, out), answer in zip(jobs, answers, strict=True):
                out.put(answer)
            self._forward_began = None
            self._lockstep.done(forward)

    def _count(self, works: list[Work]) -> None:
        scores = [work for work in works if isinstance(work, Score)]
        so_far = self.counters
        self.counters = Counters(
            forwards=so_far.forwards + 1,
            tokens=so_far.tokens + sum(work.batch.num_tokens_real for work in scores),
            dummy_tokens=so_far.dummy_tokens + (not scores),
            targets=so_far.targets + sum(work.batch.num_tokens for work in scores),
        )
