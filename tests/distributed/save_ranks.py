"""Two ranks save beside their training, on a disk that fails one of them in turn; the other must learn of it in time."""

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.batch import SoftTargets
from kdscale.config.sections import CheckpointSection
from kdscale.engine import process
from kdscale.engine.checkpoint import newest, verify
from kdscale.engine.saver import Outcome, Saver
from kdscale.engine.staging import by_age
from kdscale.errors import CheckpointError
from kdscale.losses.divergence import Divergence
from kdscale.losses.objective import Objective
from kdscale.student.layout import DataParallelStudent
from kdscale.student.saving import Saving
from kdscale.student.step import MicroBatch, Signals, StepResult
from kdscale.student.trainer import Totals
from kdscale.topology import BatchCut
from tests.conftest import PADDED_VOCAB, make_model
from tests.distributed.cut_ranks import ROWS, step_batch
from tests.distributed.launch import join, leave

VOCAB = PADDED_VOCAB - 9
_CLONE_NEWNS = 0x00020000


class Ranks:
    """This rank's student, data parallel under ZeRO-1."""

    def __init__(self, rank: int, world: int, root: Path) -> None:
        self.rank, self.world, self.root = rank, world, root
        self._cut = BatchCut(ROWS, 2, world)
        settings = {
            "train_batch_size": ROWS,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": self._cut.micro_steps,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        self._student = DataParallelStudent(make_model("llama"), VOCAB, 1 << 16, settings, rank)
        self._step = self._student.step(self._cut)
        self.done = 0

    def saver(self, limit_s: float = 60.0) -> Saver:
        return Saver(
            self._student.engine, self.root, self.done, rank=self.rank, world=self.world, keep=2, limit_s=limit_s
        )

    def train(self, **signals: Any) -> StepResult:
        batch, targets = step_batch(VOCAB)
        rows = [self._cut.rows_of(self.rank, number) for number in range(self._cut.micro_steps)]
        micro = [MicroBatch(batch.cut(part), SoftTargets.join(targets[part])) for part in rows]
        self.done += 1
        return self._step.train(micro, Objective(Divergence("forward_kl")), batch.num_tokens, 1e-2, **signals)


def saves_beside_the_training(ranks: Ranks) -> None:
    saver, outcomes = ranks.saver(), []
    for _ in range(3):
        ranks.train()
        saver.begin(ranks.done, identity={"seed": 1}, notes={"n": ranks.done})
        assert saver.writing == ranks.done
        while saver.writing is not None:
            outcomes.append(saver_step(ranks, saver))
    good = [one for one in outcomes if one is not None]
    assert [one.fault for one in good] == [""] * 3
    last = verify(good[-1].directory)
    assert (last.step, last.notes) == (good[-1].step, {"n": good[-1].step})
    assert (last.identity, last.signed) == ({"seed": 1}, True)
    assert (last.layout.world, last.layout.data, last.layout.zero_stage, last.layout.dtype) == (2, 2, 1, "float32")
    assert [step for step, _ in by_age(ranks.root)] == [one.step for one in good[:0:-1]], "keep = 2"
    assert not list(ranks.root.glob(".*"))


def saver_step(ranks: Ranks, saver: Saver) -> Outcome | None:
    """One step of training with the saver's flags beside its sums."""

    def signals() -> Signals:
        written, failed = saver.signals()
        return Signals(written=int(written), failed=int(failed))

    heard = ranks.train(signals=signals).heard
    return saver.heed(heard.written, heard.failed)


# ---- disks that fail rank 1 ----


@contextmanager
def short_files(ranks: Ranks) -> Iterator[str]:
    """No file of rank 1 grows beyond 64 KiB, as if the disk were full in the middle of it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield "File too large"
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def mounted(options: str, message: str) -> Callable[[Ranks], Any]:
    """For rank 1 alone, a file system of its own lies where the checkpoints go."""

    @contextmanager
    def disk(ranks: Ranks) -> Iterator[str]:
        if ranks.rank == 1:
            _mount("-t", "tmpfs", "-o", options, "tmpfs", str(ranks.root))
        yield message
        if ranks.rank == 1:
            subprocess.run(["umount", "--lazy", str(ranks.root)], check=True)

    return disk


def own_mounts() -> bool:
    """Whether this process may have mounts that no other process sees; it has from here on."""
    if os.geteuid() != 0 or ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        return False
    return subprocess.run(["mount", "--make-rprivate", "/"], check=False).returncode == 0


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def failing_disks() -> dict[str, Callable[[Ranks], Any]]:
    disks: dict[str, Callable[[Ranks], Any]] = {"a limit on files": short_files}
    if own_mounts():
        disks["too small"] = mounted("size=512k", "MiB are free, the checkpoint takes")
        disks["full in the middle"] = mounted("size=64m,nr_inodes=5", "No space left on device")
        disks["read-only"] = mounted("size=64m,ro", "Read-only file system")
    return disks


def one_rank_fails(ranks: Ranks, disk: Callable[[Ranks], Any]) -> None:
    saver = ranks.saver()
    ranks.train()
    saver.begin(ranks.done, identity={}, notes={})
    assert saver.wait().fault == ""  # type: ignore[union-attr]
    before = newest(ranks.root)
    assert before is not None
    process.barrier()
    with disk(ranks) as message:
        ranks.train()
        saver.begin(ranks.done, identity={}, notes={})
        outcome = None
        while outcome is None:
            outcome = saver_step(ranks, saver)
        assert "rank 1: " in outcome.fault, outcome
        assert message in outcome.fault, outcome
    process.barrier()
    assert newest(ranks.root) == before, "the older one stays"
    assert not list(ranks.root.glob(".*")), "what was half written is gone"
    saver.begin(ranks.done, identity={}, notes={})
    outcome = saver.wait()
    assert outcome is not None
    assert outcome.fault == "", "and the next one is written"


def too_slow_counts_as_failed(ranks: Ranks) -> None:
    saver = ranks.saver(limit_s=0.0)
    saver.begin(ranks.done + 1, identity={}, notes={})
    outcome = saver.wait()
    assert outcome is not None
    assert "not written within 0 s" in outcome.fault or "given up" in outcome.fault
    assert not (ranks.root / f"step-{ranks.done + 1}").exists()


def settles_without_the_other(ranks: Ranks) -> None:
    """Rank 1 leaves the training first, and without a word; what was being written is there for both."""
    saver = ranks.saver()
    ranks.train()
    saver.begin(ranks.done, identity={}, notes={})
    saver.settle(30.0)
    assert verify(ranks.root / f"step-{ranks.done}").step == ranks.done
    saver.settle(30.0)
    saver.wait()


# ---- when ----


def saving(ranks: Ranks, clock: Callable[[], float], stop: bool = False, **section: Any) -> tuple[Saving, list[dict]]:
    events: list[dict[str, Any]] = []
    made = Saving(
        ranks.saver(),
        CheckpointSection(**section),
        ranks.rank,
        identity={},
        notes=lambda totals: {},
        small=dict,
        emit=events.append,
        # One rank is told.
        should_stop=lambda: stop and ranks.rank == 1,
        grace_s=5.0,
        clock=clock,
    )
    return made, events


def go_on(ranks: Ranks, made: Saving, steps: int, *, last: bool = False) -> None:
    for _ in range(steps):
        result = ranks.train(signals=made.signals)
        made.after_step(ranks.done, result.heard, Totals(), last=last)
    if last:
        made.finish()


def saved(events: list[dict[str, Any]]) -> list[int]:
    """Steps whose checkpoints have come to exist."""
    return [int(event["path"].rsplit("-", 1)[1]) for event in events if event["kind"] == "checkpoint"]


def the_clock_of_rank_0_decides(ranks: Ranks) -> None:
    # Rank 1's clock never moves.
    now = [0.0]
    made, events = saving(ranks, lambda: now[0], every_steps=None, every_seconds=10.0)
    first = ranks.done
    for _ in range(7):
        if ranks.rank == 0:
            now[0] += 4.0
        result = ranks.train(signals=made.signals)
        made.after_step(ranks.done, result.heard, Totals(), last=False)
    made.finish()
    assert saved(events) == [first + 3, first + 6]
    stall_s = made.take_stall_seconds()
    assert stall_s > 0
    assert made.take_stall_seconds() == 0


def stop_of_one_rank_saves_before_it_returns(ranks: Ranks) -> None:
    made, events = saving(ranks, lambda: 0.0, stop=True)
    go_on(ranks, made, 1)
    assert saved(events) == [ranks.done]
    assert verify(ranks.root / f"step-{ranks.done}").signed
    assert events[0]["kind"] == "leaving"


def a_save_waits_for_the_one_before(ranks: Ranks) -> None:
    made, events = saving(ranks, lambda: 0.0, every_steps=1)
    go_on(ranks, made, 3)
    made.finish()
    assert saved(events) == [ranks.done - 2, ranks.done - 1, ranks.done]


def a_failure_stops_where_it_must(ranks: Ranks) -> None:
    message = r"rank 1: .*File too large.*earlier checkpoints are as they were"
    made, _ = saving(ranks, lambda: 0.0, every_steps=1, on_failure="stop")
    with short_files(ranks), pytest.raises(CheckpointError, match=message):
        go_on(ranks, made, 50)
    process.barrier()
    made, _ = saving(ranks, lambda: 0.0, every_steps=1)
    with short_files(ranks), pytest.raises(CheckpointError, match=message):
        go_on(ranks, made, 1, last=True)
    process.barrier()
    made, events = saving(ranks, lambda: 0.0, every_steps=1)
    with short_files(ranks):
        go_on(ranks, made, 3)
        # The third is still being written; no process may end beside it.
        with pytest.raises(CheckpointError, match=message):
            made.finish()
    assert any("TRAINING GOES ON WITHOUT IT" in event.get("phase", "") for event in events)
    process.barrier()


def main() -> None:
    rank, world, port_file, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    join(rank, world, port_file)
    ranks = Ranks(rank, world, out / "run" / "checkpoints")
    saves_beside_the_training(ranks)
    disks = failing_disks()
    for disk in disks.values():
        one_rank_fails(ranks, disk)
    (out / f"disks-{rank}").write_text("\n".join(disks))
    too_slow_counts_as_failed(ranks)
    settles_without_the_other(ranks)
    the_clock_of_rank_0_decides(ranks)
    stop_of_one_rank_saves_before_it_returns(ranks)
    a_save_waits_for_the_one_before(ranks)
    a_failure_stops_where_it_must(ranks)
    leave()


if __name__ == "__main__":
    main()
