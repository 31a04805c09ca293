"""When a student saves, and what becomes of it. Knows no Ray."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from kdscale import log
from kdscale.config.sections import CheckpointSection
from kdscale.engine.saver import Outcome, Saver
from kdscale.errors import CheckpointError
from kdscale.mirror import Mirror
from kdscale.student.step import Signals
from kdscale.student.trainer import Totals

_LOG = log.get(__name__)


class Saving:
    """Checkpoints of one run: after some steps, after some seconds by rank 0's clock, when asked to stop, and the last.

    Every rank calls ``after_step`` and ``finish``, with what all ranks heard of each other. Used as a context: where it is
    left by an error, what is being written gets ``grace_s`` to be a checkpoint.

    Raises:
        CheckpointError: on all ranks, where a save failed that the run cannot do without: its last, the one before it leaves,
            or any with ``checkpoint.on_failure: stop``.
    """

    def __init__(
        self,
        saver: Saver,
        section: CheckpointSection,
        rank: int,
        *,
        identity: dict[str, Any],
        notes: Callable[[Totals], dict[str, Any]],
        small: Callable[[], dict[str, bytes]],
        emit: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
        grace_s: float,
        mirror: Mirror | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._saver, self._section, self._rank = saver, section, rank
        self._identity, self._notes, self._small = identity, notes, small
        self._emit, self._should_stop = emit, should_stop
        self._grace_s, self._mirror, self._clock = grace_s, mirror, clock
        self._last_save = clock()
        self._stall_s = 0.0

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            self.settle(self._grace_s)

    def signals(self) -> Signals:
        """What this rank has to say at the end of a step."""
        every, done, failed = self._section.every_seconds, *self._saver.signals()
        due = self._rank == 0 and every is not None and self._clock() - self._last_save >= every
        return Signals(stop=int(self._should_stop()), save=int(due), written=int(done), failed=int(failed))

    def after_step(self, done: int, heard: Signals, totals: Totals, *, last: bool) -> None:
        """Take note of a save that has ended, and save where it is time to; the last save goes on beside what follows."""
        began = time.monotonic()
        self._note(self._saver.heed(heard.written, heard.failed))
        every = self._section.every_steps
        if last or heard.stop or heard.save or (every is not None and done % every == 0):
            self._save(done, totals, leaving=bool(heard.stop))
        if heard.stop and not last:
            self._note(self._saver.wait(), needed=True)
            if self._mirror is not None:
                # It is saved; the other half of the grace is for leaving.
                self._mirror.wait(self._grace_s / 2)
        self._stall_s += time.monotonic() - began

    def _save(self, step: int, totals: Totals, *, leaving: bool) -> None:
        earlier = self._saver.writing
        wait = f", after step {earlier}, which is still being written" if earlier is not None else ""
        self._emit({"kind": "leaving" if leaving else "phase", "phase": f"saving step {step}{wait}"})
        self._note(self._saver.wait())
        self._saver.begin(step, identity=self._identity, notes=self._notes(totals), small=self._small())
        self._last_save = self._clock()

    def finish(self) -> None:
        """Wait until the last checkpoint is there."""
        began = time.monotonic()
        self._note(self._saver.wait(), needed=True)
        self._stall_s += time.monotonic() - began
        if self._mirror is not None:
            self._mirror.wait(self._section.write_seconds)

    def mirrored(self) -> dict[str, int] | None:
        """Checkpoints copied to the mirror and copies that failed, in this life of the rank; none without a mirror."""
        return None if self._mirror is None else {"copied": self._mirror.copied, "failures": self._mirror.failures}

    def settle(self, limit_s: float) -> None:
        """See ``Saver.settle``; needs no other rank."""
        self._saver.settle(limit_s)

    def take_stall_seconds(self) -> float:
        """How long training stood still for checkpoints since the last call."""
        stall_s, self._stall_s = self._stall_s, 0.0
        return stall_s

    def _note(self, outcome: Outcome | None, *, needed: bool = False) -> None:
        if outcome is None:
            return
        if not outcome.fault:
            if self._mirror is not None:
                self._mirror.offer(outcome.directory)
            self._emit({"kind": "checkpoint", "path": str(outcome.directory), "text": _line(outcome)})
            return
        what = f"checkpoint step-{outcome.step} could not be written: {outcome.fault}"
        if needed or self._section.on_failure == "stop":
            raise CheckpointError(f"{what}; earlier checkpoints are as they were")
        if self._rank == 0:
            _LOG.warning("%s", what)
        self._emit({"kind": "phase", "phase": f"{what}; TRAINING GOES ON WITHOUT IT (checkpoint.on_failure: continue)"})


def _line(outcome: Outcome) -> str:
    return (
        f"saved {outcome.directory} ({outcome.num_bytes / 2**20:.0f} MiB; training stood still for"
        f" {outcome.stall_seconds:.2f} s, writing took {outcome.write_seconds:.1f} s)"
    )
