"""Text that the sharded teacher writes, and a student that learns from it."""

import contextlib
import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.failure.runs import ranks_of
from tests.runs import assert_nothing_left, finish, run, start, steps, wait_for_file, write_config

pytestmark = pytest.mark.slow
SECTION = {"prompt_tokens": 6, "new_tokens": 24, "batch_rows": 3, "top_p": 0.9}


def wait_for_text(path: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
    wait_for_file(path, process, log)
    while path.is_file():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_size:
                return
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)


def test_killed_and_gone_on_with_the_teacher_writes_the_same(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """Two ranks of ZeRO-3 in lockstep; then a student trains on what they wrote, with soft targets."""
    config = write_config(tmp_path, teacher_dir, text_dir, teacher={"ranks": 2}, generate=SECTION)
    log, whole, halves = tmp_path / "log", tmp_path / "whole.jsonl", tmp_path / "halves.jsonl"
    assert run("generate", str(config), str(whole), log=log) == 0, log.read_text()
    lines = [json.loads(one) for one in whole.read_text().splitlines()]
    assert len(lines) > 40
    assert all(one["prompt"] and one["completion"].strip() for one in lines)

    process = start("generate", str(config), str(halves), log=log)
    partial = tmp_path / "halves.jsonl.partial"
    wait_for_text(partial, process, log)
    process.kill()
    process.wait()
    assert_nothing_left(within_s=15)
    assert not halves.exists()
    assert run("generate", str(config), str(halves), log=log) == 0, log.read_text()
    assert halves.read_bytes() == whole.read_bytes()
    assert run("generate", str(config), str(whole), "generate.top_p=0.5", log=log) == 1
    assert "sampling.top_p: recorded 0.9, now 0.5" in log.read_text()

    trained = [f"data.train=[{whole}]", "data.loss_on=completion", "loss.hard_weight=0.5", "run.name=on-generated"]
    assert run("train", str(config), *trained, log=log) == 0, log.read_text()
    assert steps(tmp_path / "runs" / "on-generated") == list(range(1, 13))
    assert_nothing_left()


def test_a_lost_author_is_started_again(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """A rank killed while it writes costs a restart, and no line."""
    config = write_config(tmp_path, teacher_dir, text_dir, teacher={"ranks": 2}, generate=SECTION | {"limit": 48})
    log, out, undisturbed = tmp_path / "log", tmp_path / "out.jsonl", tmp_path / "undisturbed.jsonl"
    process = start("generate", str(config), str(out), log=log)
    partial = tmp_path / "out.jsonl.partial"
    wait_for_text(partial, process, log)
    ranks_of("TeacherRank")[1].kill()
    assert finish(process, log) == 0, log.read_text()
    assert "of the teacher is lost" in log.read_text()
    assert run("generate", str(config), str(undisturbed), log=log) == 0, log.read_text()
    assert out.read_bytes() == undisturbed.read_bytes()
    assert_nothing_left()
