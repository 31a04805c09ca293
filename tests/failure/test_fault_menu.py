"""One run, many faults: each is noticed in time, and what the run trains on stays what it was."""

import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from kdscale.engine.checkpoint import newest
from tests.failure.runs import (
    NOTICE_S,
    SLACK_S,
    START_S,
    config_of,
    last_step,
    ranks_of,
    trained,
    wait_for_progress,
    wait_for_ranks,
    wait_for_words,
)
from tests.runs import assert_nothing_left, finish, start, wait_for_step

pytestmark = pytest.mark.slow

LOAD_HEARTBEAT_S, STUDENT_HEARTBEAT_S = 6.0, 4.0


@dataclass
class Running:
    config: Path
    log: Path
    directory: Path
    process: "subprocess.Popen[bytes]"
    read: int = 0
    """How much of the log belongs to earlier cases."""
    lost: list[psutil.Process] = field(default_factory=list)

    def await_words(self, words: str, within_s: float) -> None:
        self.read = wait_for_words(words, self.process, self.log, within_s, self.read)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, text_dir: Path) -> Iterator[Running]:
    tmp_path = tmp_path_factory.mktemp("menu")
    config = config_of(
        tmp_path,
        teacher_dir,
        text_dir,
        teacher={"restarts": 20, "restart_wait_seconds": 0.01, "load_heartbeat_seconds": LOAD_HEARTBEAT_S},
        student={"restarts": 20, "restart_wait_seconds": 0.01, "heartbeat_seconds": STUDENT_HEARTBEAT_S},
    )
    log = tmp_path / "log"
    process = start("train", str(config), log=log)
    yield Running(config, log, tmp_path / "runs" / "tiny", process)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


@pytest.mark.parametrize(
    ("moment", "number", "within_s"),
    [
        ("starting", signal.SIGKILL, NOTICE_S),
        ("loading", signal.SIGSEGV, NOTICE_S),
        ("loading", signal.SIGSTOP, LOAD_HEARTBEAT_S + SLACK_S),
    ],
)
def test_teacher_rank_is_lost_before_it_serves(running: Running, moment: str, number: signal.Signals, within_s: float):
    """Of the first three generations."""
    ranks = wait_for_ranks("TeacherRank", 2, running.lost, running.process, running.log)
    if moment == "loading":
        running.await_words("replica-0 of the teacher loads", START_S)
    ranks[1].send_signal(number)
    running.await_words("replica-0 of the teacher is lost", within_s)
    assert not psutil.wait_procs(ranks, timeout=10)[1], "the whole group is killed"
    running.lost += ranks


def take_memory(rank: psutil.Process) -> None:
    """From here on every allocation fails: a MemoryError, or worse."""
    rank.rlimit(psutil.RLIMIT_AS, (1 << 20, 1 << 20))


FAULTS: dict[str, Callable[[psutil.Process], None]] = {
    "SIGKILL": psutil.Process.kill,
    "SIGSEGV": lambda rank: rank.send_signal(signal.SIGSEGV),
    "SIGSTOP": psutil.Process.suspend,
    "out of memory": take_memory,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_teacher_rank_is_lost_mid_stream(running: Running, fault: str):
    wait_for_progress(running.directory, running.process, running.log)
    ranks = ranks_of("TeacherRank")
    assert len(ranks) == 2
    FAULTS[fault](ranks[1])
    running.await_words("replica-0 of the teacher is lost", NOTICE_S)
    assert not psutil.wait_procs(ranks, timeout=10)[1], "the whole group is killed"
    running.await_words("replica-0 of the teacher serves again", START_S)
    wait_for_progress(running.directory, running.process, running.log)


@pytest.mark.parametrize(
    ("number", "within_s"),
    [
        (signal.SIGKILL, NOTICE_S),
        (signal.SIGSEGV, NOTICE_S),
        (signal.SIGSTOP, STUDENT_HEARTBEAT_S + SLACK_S),
    ],
    ids=["SIGKILL", "SIGSEGV", "SIGSTOP"],
)
def test_student_rank_is_lost(running: Running, number: signal.Signals, within_s: float):
    wait_for_step(running.directory, 25, running.process, running.log)
    (rank,) = ranks_of("StudentRank")
    rank.send_signal(number)
    running.await_words("the student is lost", within_s)
    assert not psutil.wait_procs([rank], timeout=10)[1]
    running.await_words("starting the student again from its newest checkpoint", START_S)
    wait_for_progress(running.directory, running.process, running.log)


def test_every_step_was_trained_once_and_as_without_faults(running: Running):
    """Rows, order and losses, bit for bit, against a run that nothing disturbed."""
    running.process.send_signal(signal.SIGTERM)
    assert finish(running.process, running.log, within_s=20) == 130, running.log.read_text()
    assert_nothing_left()
    saved = newest(running.directory / "checkpoints")
    assert saved is not None
    faulty = trained(running.directory)
    assert [step for step, _, _ in faulty] == list(range(1, len(faulty) + 1)), "each step once, in order"
    assert len(faulty) == saved.step

    undisturbed, log = running.directory.parent / "undisturbed", running.log.with_name("undisturbed.log")
    process = start("train", str(running.config), "run.name=undisturbed", log=log)
    wait_for_step(undisturbed, last_step(running.directory), process, log)
    process.send_signal(signal.SIGTERM)
    assert finish(process, log, within_s=20) == 130
    assert trained(undisturbed)[: len(faulty)] == faulty
    assert_nothing_left()
