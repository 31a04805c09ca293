"""Student ranks under the DeepSpeed launcher, a teacher under Ray."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from kdscale.stream.protocol import Access
from tests.runs import (
    OURS,
    TEMP,
    assert_nothing_left,
    finish,
    marked_running,
    start,
    steps,
    wait_for_file,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
GRACE_S = 8.0


class Served:
    """A teacher that is served, and the command that trains from it on two ranks."""

    def __init__(self, tmp_path: Path, teacher_dir: Path, text_dir: Path) -> None:
        self.config = write_config(
            tmp_path,
            teacher_dir,
            text_dir,
            teacher={"ranks": 2},
            train={"steps": 4000, "micro_rows": 1, "schedule": "constant"},
            checkpoint={"mirror": f"file://{tmp_path}/mirror"},
            cluster={"grace_seconds": GRACE_S},
            run={"deterministic": True},
            stream={"tls": "always"},
        )
        self.cache = tmp_path / "models"
        self.directory = tmp_path / "runs" / "tiny"
        self.log, self.endpoints = tmp_path / "log", tmp_path / "teacher.json"
        self.log.touch()
        self.teacher_log = tmp_path / "teacher.log"
        self.teacher = start("teacher", str(self.config), "--write", str(self.endpoints), log=self.teacher_log)

    def ready(self) -> "Served":
        wait_for_file(self.endpoints, self.teacher, self.teacher_log)
        return self

    def launch(self, *more: str) -> "subprocess.Popen[bytes]":
        command = ["bash", "launch/deepspeed.sh", str(self.config), "--teacher-endpoints", str(self.endpoints)]
        env = os.environ | OURS | {"KDSCALE_VENV": sys.prefix, "KDSCALE_MODEL_CACHE": str(self.cache)}
        with self.log.open("ab") as out:
            return subprocess.Popen(
                [*command, "student.parallel.data=2", *more], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
            )

    def reach(self, process: "subprocess.Popen[bytes]", more: int) -> int:
        """Wait until ``more`` steps are done; returns the last one."""
        wait_for_step(self.directory, (steps(self.directory) or [0])[-1] + more, process, self.log)
        return steps(self.directory)[-1]

    def last(self, pattern: str) -> int:
        """The number that the newest line like ``pattern`` tells."""
        return int(re.findall(pattern, self.log.read_text())[-1])

    def close(self) -> None:
        self.teacher.send_signal(signal.SIGTERM)
        finish(self.teacher, self.teacher_log, within_s=30)


@pytest.fixture
def served(tmp_path: Path, teacher_dir: Path, text_dir: Path) -> Iterator[Served]:
    one = Served(tmp_path, teacher_dir, text_dir)
    try:
        yield one.ready()
    finally:
        one.close()
    assert_nothing_left()


def launched(rank: str) -> list[psutil.Process]:
    found = []
    for one in marked_running("kdscale.worker"):
        with contextlib.suppress(psutil.NoSuchProcess):
            if one.environ().get("RANK") == rank:
                found.append(one)
    return found


def assert_no_rank_left(within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while left := marked_running("kdscale.worker"):
        assert time.monotonic() < deadline, [" ".join(process.cmdline()) for process in left]
        time.sleep(0.1)
    assert [path for path in TEMP.glob("kdscale-*/**/rank-*.json")] == []


def test_launched_ranks_die_stop_go_on_and_end(served: Served, tmp_path: Path, teacher_dir: Path):
    # A rank that is killed: its own exit code, a clear word, and no other rank left.
    run = served.launch()
    served.reach(run, 6)
    (rank,) = [one for one in launched("1") if "launcher" not in " ".join(one.cmdline())]
    rank.kill()
    assert run.wait(timeout=GRACE_S + 2) == 1, served.log.read_text()
    assert re.search(
        r"StudentError: student rank 1 \(pid \d+\) died without a word, by a signal", served.log.read_text()
    )
    assert_no_rank_left(0)

    # SIGTERM: saved at the step in progress.
    run = served.launch()
    served.reach(run, 6)
    run.terminate()
    assert run.wait(timeout=GRACE_S + 2) == 130, served.log.read_text()
    saved = served.last(r"stopped, saved at step (\d+)")
    assert (served.directory / "checkpoints" / f"step-{saved}" / "MANIFEST.json").is_file()
    assert_no_rank_left(0)

    # SIGKILL of the one who watches: the ranks notice, save and leave.
    run = served.launch()
    served.reach(run, 6)
    assert served.last(r"going on from step (\d+)") == saved
    run.kill()
    run.wait()
    assert_no_rank_left(GRACE_S + 2)
    again = served.last(r"stopped, saved at step (\d+)")
    assert again > saved

    assert steps(served.directory) == list(range(1, again + 1))

    # To the end, on two hosts of one rank each (this machine plays both) that have the run's key and nothing else of it:
    # the checkpoint comes from the mirror, the teacher's files from a URL.
    there = tmp_path / "there" / "tiny"
    there.mkdir(parents=True)
    shutil.copy(served.directory / ".checkpoint-key", there)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    more = ["--hostfile", str(hosts), "--master_addr", "127.0.0.1", f"run.dir={there.parent}"]
    more += [f"teacher.model=file://{teacher_dir}", f"train.steps={again + 6}"]
    pair = [served.launch(*more, "--node_rank", str(here)) for here in (0, 1)]
    assert [finish(run, served.log) for run in pair] == [0, 0], served.log.read_text()
    assert served.last(r"step-(\d+) was fetched from file://") == again
    assert served.last(r"going on from step (\d+)") == again
    (copy,) = [path for path in served.cache.iterdir() if path.is_dir()]
    assert (copy / "model.safetensors").read_bytes() == (teacher_dir / "model.safetensors").read_bytes()
    assert steps(there) == list(range(again + 1, again + 7))
    summary = json.loads((there / "summary.json").read_text())
    assert (summary["steps"], summary["student_ranks"], summary["teacher_ranks"]) == (again + 6, 2, 2)
    assert summary["mirror"]["copied"] >= 1
    assert summary["mirror"]["failures"] == 0
    assert summary["canary"].startswith("ok")
    assert summary["kl_after"] < summary["kl_before"]
    assert (there / "student" / "model.safetensors").is_file()
    assert Access.load(served.endpoints).token not in served.log.read_text()
