"""A teacher that dies or stops while it serves is built again, and training goes on as if nothing had happened."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from kdscale.engine.checkpoint import newest
from tests.runs import (
    assert_nothing_left,
    finish,
    marked_running,
    run,
    start,
    steps,
    wait_for_file,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.slow

STEPS = 150
# Of a machine of two cores that runs the rest of the run as well.
SLACK_S = 2.0


def teacher_ranks() -> list[psutil.Process]:
    """By rank is by age; the one to be killed is as good as the other."""
    return sorted(marked_running("TeacherRank"), key=lambda process: process.create_time())


def config_of(tmp_path: Path, teacher_dir: Path, text_dir: Path, **sections: Any) -> Path:
    fields: dict[str, Any] = {
        "run": {"deterministic": True},
        "train": {"steps": STEPS, "batch_rows": 4, "micro_rows": 2},
        "checkpoint": {"every_steps": 20},
        "evaluate": {"quality": False},
    }
    return write_config(tmp_path, teacher_dir, text_dir, **(fields | sections))


def losses(run_directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def wait_for_words(words: str, process: Any, log: Path, within_s: float) -> float:
    """Seconds until ``words`` stand in the log."""
    began = time.monotonic()
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() - began < within_s, f"{words!r} not within {within_s} s:\n{log.read_text()}"
        time.sleep(0.05)
    return time.monotonic() - began


def test_killed_and_stopped_ranks_change_no_loss(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = config_of(tmp_path, teacher_dir, text_dir)
    log, runs = tmp_path / "log", tmp_path / "runs"
    assert run("train", str(config), log=log) == 0, log.read_text()
    assert json.loads((runs / "tiny" / "summary.json").read_text())["teacher_restarts"] == 0
    undisturbed = losses(runs / "tiny")

    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        log = tmp_path / f"{name}.log"
        process = start("train", str(config), f"run.name={name}", log=log)
        wait_for_step(runs / name, 20, process, log)
        before = teacher_ranks()
        assert len(before) == 2
        before[1].send_signal(number)
        assert wait_for_words("restart 1 of 3", process, log, within_s=20) < 5 + SLACK_S
        assert finish(process, log) == 0, log.read_text()
        assert not any(one.is_running() for one in before)
        assert_nothing_left()
        assert steps(runs / name) == list(range(1, STEPS + 1)), "each step once, in order"
        assert losses(runs / name) == pytest.approx(undisturbed, abs=1e-6)
        summary = json.loads((runs / name / "summary.json").read_text())
        assert summary["teacher_restarts"] == 1
        assert "the teacher is being rebuilt (replica-0)" in log.read_text()


def test_rank_killed_while_it_loads_again(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """The second fault costs a second restart; with none left, the third ends the run in time, its checkpoint intact."""
    config = config_of(
        tmp_path,
        teacher_dir,
        text_dir,
        teacher={"restarts": 2},
        train={"steps": 4000, "batch_rows": 4, "micro_rows": 2},
    )
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    process = start("train", str(config), log=log)
    wait_for_step(directory, 25, process, log)
    first = teacher_ranks()
    first[0].kill()
    wait_for_words("restart 1 of 2", process, log, within_s=20)
    deadline = time.monotonic() + 60
    while not (loading := [one for one in teacher_ranks() if one not in first]):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    loading[0].kill()
    wait_for_words("restart 2 of 2", process, log, within_s=30)
    wait_for_words("the teacher serves again", process, log, within_s=90)
    wait_for_step(directory, steps(directory)[-1] + 20, process, log)
    teacher_ranks()[1].kill()
    assert finish(process, log, within_s=15) == 1
    assert "TeacherError: teacher, rank" in log.read_text()
    assert "no restart is left (teacher.restarts = 2)" in log.read_text()
    assert_nothing_left()
    assert newest(directory / "checkpoints") is not None


def test_rank_killed_while_it_loads_first_ends_the_run(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config, log = config_of(tmp_path, teacher_dir, text_dir), tmp_path / "log"
    process = start("train", str(config), log=log)
    deadline = time.monotonic() + 60
    while len(loading := teacher_ranks()) < 2:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    loading[1].kill()
    assert finish(process, log, within_s=30) == 1
    assert "TeacherError: teacher, rank" in log.read_text()
    assert_nothing_left()


def test_stop_during_a_rebuild_stops_in_time(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = config_of(tmp_path, teacher_dir, text_dir, teacher={"restart_wait_seconds": 30})
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    process = start("train", str(config), log=log)
    wait_for_step(directory, 25, process, log)
    teacher_ranks()[0].kill()
    wait_for_words("restart 1 of 3", process, log, within_s=20)
    process.send_signal(signal.SIGTERM)
    assert finish(process, log, within_s=12) == 130
    assert_nothing_left()
    assert newest(directory / "checkpoints") is not None


def test_served_teacher_is_rebuilt_for_its_clients(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = config_of(tmp_path, teacher_dir, text_dir)
    endpoints, log, teacher_log = tmp_path / "teacher.json", tmp_path / "log", tmp_path / "teacher.log"
    teacher = start("teacher", str(config), "--write", str(endpoints), log=teacher_log)
    wait_for_file(endpoints, teacher, teacher_log)
    process = start("train", str(config), "run.name=client", "--teacher-endpoints", str(endpoints), log=log)
    wait_for_step(tmp_path / "runs" / "client", 20, process, log)
    teacher_ranks()[0].kill()
    assert finish(process, log) == 0, log.read_text()
    assert steps(tmp_path / "runs" / "client") == list(range(1, STEPS + 1))
    assert json.loads((tmp_path / "runs" / "client" / "summary.json").read_text())["teacher_restarts"] == 1
    teacher.send_signal(signal.SIGTERM)
    assert finish(teacher, teacher_log, within_s=30) == 130
    assert_nothing_left()
