"""A student that is slow, stopped or gone costs the teacher a bounded queue, and other students nothing."""

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kdscale.spec import TargetSpec
from kdscale.stream.prefetch import Prefetcher
from kdscale.stream.protocol import Access
from tests.served import TOKEN, Teacher, batch

TOPK = TargetSpec("topk", k=7)
THREADS = 4


@pytest.fixture
def teacher(teacher_dir: Path) -> Iterator[Teacher]:
    teacher = Teacher(teacher_dir)
    yield teacher
    teacher.close()


def wait_for(condition: Callable[[], bool], what: str, within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_slow_student_bounds_the_queue(teacher: Teacher):
    """The window is all that is ever asked ahead, however long the student takes over a batch."""
    asked, source = itertools.count(), teacher.source()
    prefetcher = Prefetcher(
        source, ((batch(seed=next(asked)), TOPK) for _ in itertools.repeat(None)), in_flight=THREADS
    )
    for taken in range(6):
        prefetcher.settle()
        time.sleep(0.3)
        counters = teacher.scorer.counters
        assert counters.forwards <= taken + THREADS, "the teacher works for nobody"
        wait_for(lambda: teacher.server.in_flight == 0, "what was asked for was answered")
        prefetcher.next()
    assert next(asked) <= 6 + THREADS
    prefetcher.close()
    source.close()


def test_stopped_student_blocks_nobody(teacher: Teacher, tmp_path: Path):
    """It stops while megabytes are on their way to it. The others are served; once it is dead, nothing of it is left."""
    access_file = tmp_path / "access.json"
    Access(teacher.directory.address, TOKEN).save(access_file)
    command = [sys.executable, "-m", "tests.failure.greedy_student", str(access_file), str(THREADS)]
    greedy = subprocess.Popen(command, stdout=subprocess.PIPE)
    source = teacher.source(stall_seconds=20, give_up_seconds=20)
    try:
        assert greedy.stdout is not None
        assert b"served\n" in iter(greedy.stdout.readline, b"")
        greedy.send_signal(signal.SIGSTOP)
        wait_for(lambda: teacher.scorer.forward_seconds() == 0, "the forward in progress ends")
        time.sleep(1)
        stuck = teacher.server.in_flight
        assert 0 < stuck <= THREADS, "answers wait for the stopped student, no more than it has asked for"
        began = time.monotonic()
        for seed in range(20):
            rows = batch(seed=seed)
            assert source.fetch(rows, TOPK).labels_T.tolist() == rows.labels().tolist()
        assert time.monotonic() - began < 10
        wait_for(lambda: teacher.server.in_flight == stuck, "the others' exchanges are idle")
    finally:
        greedy.kill()
        greedy.wait()
    wait_for(lambda: teacher.server.in_flight == 0, "the dead student's exchanges end")
    source.close()
