"""The edges of starting again: nobody there to notice, nothing left to spend, asked to stop meanwhile."""

import json
import signal
import time
from pathlib import Path

import pytest

from kdscale.engine.checkpoint import newest
from tests.failure.runs import NOTICE_S, START_S, config_of, ranks_of, wait_for_words
from tests.runs import assert_nothing_left, finish, run, start, steps, wait_for_file, wait_for_step

pytestmark = pytest.mark.slow

# Of a run that has nothing left to try, from the fault to its exit: 15 s, and slack for a busy machine.
END_S = 15.0 + 10.0


def test_no_student_restart_left_ends_the_run_with_its_checkpoint_intact(
    tmp_path: Path, teacher_dir: Path, text_dir: Path
):
    config = config_of(tmp_path, teacher_dir, text_dir, student={"restarts": 0, "heartbeat_seconds": 8})
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    process = start("train", str(config), log=log)
    wait_for_step(directory, 25, process, log)
    wait_for_file(directory / "checkpoints" / "step-20" / "MANIFEST.json", process, log)
    ranks_of("StudentRank")[0].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert finish(process, log, within_s=40) == 1
    assert time.monotonic() - began < END_S
    assert "StudentError: student, rank 0 has not answered for" in log.read_text()
    assert "no restart is left (student.restarts = 0)" in log.read_text()
    assert_nothing_left()
    saved = newest(directory / "checkpoints")
    assert saved is not None
    assert saved.step >= 20


def test_rank_that_answers_but_hangs_is_lost(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """Any forward takes longer than nothing at all."""
    config = config_of(tmp_path, teacher_dir, text_dir, teacher={"restarts": 0, "forward_seconds": 1e-6})
    log = tmp_path / "log"
    assert run("train", str(config), log=log) == 1
    assert "hangs in forward" in log.read_text()
    assert "teacher.forward_seconds = 1e-06" in log.read_text()
    assert_nothing_left()


def test_stop_during_a_rebuild_stops_in_time(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = config_of(tmp_path, teacher_dir, text_dir, teacher={"restart_wait_seconds": 30})
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    process = start("train", str(config), log=log)
    wait_for_step(directory, 25, process, log)
    ranks_of("TeacherRank")[0].kill()
    wait_for_words("restart 1 of 3", process, log, within_s=NOTICE_S)
    process.send_signal(signal.SIGTERM)
    assert finish(process, log, within_s=12) == 130
    assert_nothing_left()
    assert newest(directory / "checkpoints") is not None


def test_served_teacher_is_rebuilt_idle_and_for_its_clients(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = config_of(tmp_path, teacher_dir, text_dir, train={"steps": 60})
    endpoints, log, teacher_log = tmp_path / "teacher.json", tmp_path / "log", tmp_path / "teacher.log"
    teacher = start("teacher", str(config), "--write", str(endpoints), log=teacher_log)
    wait_for_file(endpoints, teacher, teacher_log)
    ranks_of("TeacherRank")[1].send_signal(signal.SIGSTOP)
    read = wait_for_words("restart 1 of 3", teacher, teacher_log, within_s=NOTICE_S)
    read = wait_for_words("serves again (generation 1)", teacher, teacher_log, START_S, read)

    process = start("train", str(config), "run.name=client", "--teacher-endpoints", str(endpoints), log=log)
    directory = tmp_path / "runs" / "client"
    wait_for_step(directory, 5, process, log)
    ranks_of("TeacherRank")[0].kill()
    wait_for_words("restart 2 of 3", teacher, teacher_log, NOTICE_S, read)
    assert finish(process, log) == 0, log.read_text()
    assert steps(directory) == list(range(1, 61)), "each step once, in order"
    assert json.loads((directory / "summary.json").read_text())["teacher_restarts"] == 2
    teacher.send_signal(signal.SIGTERM)
    assert finish(teacher, teacher_log, within_s=30) == 130
    assert_nothing_left()
