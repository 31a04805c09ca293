"""Student ranks under the DeepSpeed launcher, a teacher under Ray."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kdscale.stream.protocol import Access
from tests.runs import OURS, assert_nothing_left, finish, marked_running, start, steps, wait_for_file, write_config

pytestmark = pytest.mark.slow


def launch(ranks: int, *arguments: str, log: Path) -> int:
    """Two ranks of ``kdscale.worker`` by ``deepspeed``; the launcher's exit code, with everything printed in ``log``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(sys.prefix) / "bin" / "deepspeed"), "--num_accelerators", str(ranks)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port), "--module", "kdscale.worker", *arguments]
    environment = os.environ | OURS | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with log.open("ab") as out:
        return subprocess.run(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, timeout=240, check=False
        ).returncode


def test_launched_ranks_learn_from_a_served_teacher(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = write_config(tmp_path, teacher_dir, text_dir, stream={"tls": "always"})
    log, teacher_log, endpoints = tmp_path / "log", tmp_path / "teacher.log", tmp_path / "teacher.json"
    given = ["--config", str(config), "--teacher-endpoints", str(endpoints), "student.parallel.data=2"]
    log.touch()
    teacher = start("teacher", str(config), "--write", str(endpoints), log=teacher_log)
    try:
        wait_for_file(endpoints, teacher, teacher_log)
        assert launch(2, *given, log=log) == 0, log.read_text()
        directory = tmp_path / "runs" / "tiny"
        summary = json.loads((directory / "summary.json").read_text())
        assert (summary["steps"], summary["student_ranks"], summary["teacher_ranks"]) == (12, 2, 2)
        assert summary["canary"].startswith("ok")
        assert summary["kl_after"] < summary["kl_before"]
        assert steps(directory) == list(range(1, 13))
        assert (directory / "student" / "model.safetensors").is_file()
        assert Access.load(endpoints).token not in log.read_text()

        assert launch(2, *given, "train.steps=15", "checkpoint.allow_changed=[train.steps]", log=log) == 0
        assert "going on from step 12" in log.read_text()
        assert steps(directory) == list(range(1, 16))

        assert launch(2, *given[:-1], log=log) != 0
        assert "the launcher started 2 ranks and student.parallel" in log.read_text()
    finally:
        teacher.send_signal(signal.SIGTERM)
        finish(teacher, teacher_log, within_s=30)
    assert marked_running("kdscale.worker") == []
    assert_nothing_left()
