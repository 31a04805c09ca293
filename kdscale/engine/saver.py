"""Checkpoints of a training engine, written behind its back: the ranks' side of it.

``begin`` clones the state to host memory and returns; threads write (``writer``). The ranks learn how it ended by
adding up two flags, ``done`` and ``failed``, beside the sums of a training step (``signals``, ``heed``), or in ``wait``.
Every rank calls ``begin``, ``heed`` and ``wait`` at the same points; ``settle`` needs nobody else.
"""

import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdscale import log
from kdscale.engine.capture import install
from kdscale.engine.environment import environment
from kdscale.engine.fragments import SHARDS
from kdscale.engine.manifest import Layout, key_of
from kdscale.engine.process import sum_over_ranks, text_of_ranks
from kdscale.engine.randomness import random_state, state_file
from kdscale.engine.staging import clean, final_directory, set_aside, staging_directory
from kdscale.engine.training import Engine
from kdscale.engine.writer import Ticket, Writer
from kdscale.errors import CheckpointError

_LOG = log.get(__name__)
_POLL_S = 0.02
_LOG_PERIOD_S = 10.0


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on all ranks but for the times."""

    step: int
    directory: Path
    fault: str
    """Why nothing was saved; empty when ``directory`` is a whole checkpoint."""
    num_bytes: int
    stall_seconds: float
    """Training stood still for it."""
    write_seconds: float
    """It took this rank to write, beside the training."""


class Saver:
    """One for the life of an engine. At most one checkpoint is in host memory at a time."""

    def __init__(
        self, engine: Engine, root: Path, start_step: int, *, rank: int, world: int, keep: int, limit_s: float
    ) -> None:
        """Ready ``root``, on storage that all ranks share, for a run that goes on from ``start_step``: checkpoints of later
        steps are set aside, half written ones removed. Every rank calls it.

        Writing that takes longer than ``limit_s`` counts as failed.

        Raises:
            CheckpointError: on every rank, when rank 0 cannot.
        """
        self._engine, self._root, self._rank, self._world = engine, root, rank, world
        self._keep, self._limit_s = keep, limit_s
        self._capture = install(engine)
        self._writer: Writer | None = None
        self._stuck: Writer | None = None
        self._began = self._stall_s = 0.0
        self._failing = False
        fault = ""
        try:
            self._key = self._prepare(start_step) if rank == 0 else None
        except (OSError, CheckpointError) as error:
            fault = str(error)
        self._token, fault = (
            text_of_ranks(secrets.token_hex(4), engine.device)[0],
            text_of_ranks(fault, engine.device)[0],
        )
        if fault:
            raise CheckpointError(f"{root} cannot take checkpoints: {fault}")

    def _prepare(self, start_step: int) -> bytes | None:
        self._root.mkdir(parents=True, exist_ok=True)
        clean(self._root)
        set_aside(self._root, start_step)
        return key_of(self._root.parent, make=True)

    @property
    def writing(self) -> int | None:
        """Step of the checkpoint that is being written; none when there is none."""
        return None if self._writer is None else self._writer.ticket.step

    def begin(
        self, step: int, *, identity: dict[str, Any], notes: dict[str, Any], small: dict[str, bytes] | None = None
    ) -> None:
        """Clone what training has come to, to be written as ``root/step-N``; every rank calls it, and ``wait`` before.

        ``small`` are further files of this rank, by path inside the checkpoint.
        """
        assert self._writer is None, "wait() comes before begin()"
        began = time.monotonic()
        staging = staging_directory(self._root, step, self._token)
        stuck = self._stuck is not None and not self._stuck.ended
        # Its copy is still in memory: no second one.
        self._capture.refuse(OSError(f"an earlier write still hangs, in {self._root}") if stuck else None)
        pipeline = layout_of(self._engine, self._world).pipeline > 1
        self._engine.save_checkpoint(
            str(staging), tag=SHARDS, save_latest=False, exclude_frozen_parameters=not pipeline
        )
        captured = self._capture.take()
        small = {state_file(self._rank): random_state(), **(small or {})}
        own = captured.num_bytes + sum(map(len, small.values()))
        total = sum_over_ranks(torch.tensor(float(own), dtype=torch.float64, device=self._engine.device))
        ticket = Ticket(
            step=step,
            staging=staging,
            final=final_directory(self._root, step),
            layout=layout_of(self._engine, self._world),
            identity=identity,
            notes=notes,
            environment=environment(self._engine.device),
            num_bytes=int(total),
            keep=self._keep,
            key=self._key,
        )
        self._failing = False
        self._writer = Writer(ticket, self._rank, captured, small)
        self._began, self._stall_s = began, time.monotonic() - began

    def signals(self) -> tuple[bool, bool]:
        """(done, failed): how this rank's writing has ended; neither while it goes on or there is none."""
        writer = self._writer
        if writer is None:
            return False, False
        if writer.ended:
            failed = writer.fault is not None
            return not failed, failed
        overdue = time.monotonic() - self._began > self._limit_s
        if overdue:
            writer.give_up()
        return False, overdue

    def heed(self, done: int, failed: int) -> Outcome | None:
        """Take note of how many ranks are done and how many failed; the outcome once it is known of all. Every rank calls
        it with the same numbers."""
        writer = self._writer
        if writer is None:
            return None
        if failed and not self._failing:
            # The others need not write the rest, and rank 0 must not wait for a list that never comes.
            self._failing = True
            writer.give_up()
        if done + failed < self._world:
            return None
        began = time.monotonic()
        fault = self._fault(writer) if failed else ""
        self._writer, self._stuck = None, None if writer.ended else writer
        if fault and self._rank == 0 and writer.ended:
            # Not under the hands of a writer that hangs; what that one leaves, the next run cleans away.
            shutil.rmtree(writer.ticket.staging, ignore_errors=True)
        stall_s = self._stall_s + time.monotonic() - began
        ticket = writer.ticket
        return Outcome(ticket.step, ticket.final, fault, ticket.num_bytes, stall_s, writer.seconds)

    def _fault(self, writer: Writer) -> str:
        """What the ranks say of it, one line."""
        mine = ""
        if not writer.ended:
            mine = f"not written within {self._limit_s:g} s"
        elif writer.fault is not None:
            mine = f"{type(writer.fault).__name__}: {writer.fault}"
        said = text_of_ranks(mine, self._engine.device)
        return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text)

    def wait(self) -> Outcome | None:
        """Wait for what is being written; none when there is nothing. Every rank calls it."""
        if self._writer is None:
            return None
        began, logged = time.monotonic(), time.monotonic()
        while True:
            flags = torch.tensor([*map(float, self.signals())], device=self._engine.device)
            done, failed = sum_over_ranks(flags).tolist()
            self._stall_s, began = self._stall_s + time.monotonic() - began, time.monotonic()
            if (outcome := self.heed(int(done), int(failed))) is not None:
                return outcome
            if self._rank == 0 and began - logged > _LOG_PERIOD_S:
                logged = began
                _LOG.info(
                    "waiting for checkpoint step-%d to be written: %d of %d ranks", self.writing, done, self._world
                )
            assert self._writer is not None
            self._writer.join(_POLL_S)

    def settle(self, limit_s: float) -> None:
        """Before leaving because of an error, any rank, any thread: give what is being written ``limit_s`` to become a
        checkpoint. The other ranks' threads write on whatever their training does."""
        writer = self._writer
        if writer is None:
            return
        _LOG.info("waiting up to %g s for checkpoint step-%d to be written", limit_s, writer.ticket.step)
        deadline = time.monotonic() + limit_s
        writer.join(limit_s)
        while writer.fault is None and not writer.ticket.final.is_dir() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        if not writer.ticket.final.is_dir():
            _LOG.warning("checkpoint step-%d was not written: %s", writer.ticket.step, writer.fault or "too late")


def layout_of(engine: Engine, world: int) -> Layout:
    """How ``engine`` lies on its ranks."""
    pipeline = int(getattr(engine, "num_stages", 1))
    dtype = "bfloat16" if engine.bfloat16_enabled() else "float32"
    return Layout(world, pipeline, world // pipeline, int(engine.zero_optimization_stage()), dtype)
