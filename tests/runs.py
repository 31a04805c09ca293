"""Starting real runs from tests, and looking for what they leave behind."""

import atexit
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import yaml

KDSCALE = [sys.executable, "-m", "kdscale.cli"]
MARK = uuid.uuid4().hex
TEMP = Path(tempfile.mkdtemp(prefix="kdt-", dir="/tmp"))
"""Where a run's temporary files are; the paths of Ray's sockets below it must stay short."""
atexit.register(shutil.rmtree, TEMP, ignore_errors=True)
PATIENCE_S = 400
"""For what only has to come some time: how fast a machine is decides no test. Below pytest's own limit."""
# Everything a test starts inherits this, so that other runs on the machine are none of its business.
OURS = {"KDSCALE_TEST_SESSION": MARK, "TMPDIR": str(TEMP)}
SHARED_MEMORY_BEFORE = set(os.listdir("/dev/shm"))


def write_config(tmp_path: Path, teacher_dir: Path, text_dir: Path, **sections: dict[str, Any]) -> Path:
    """A tiny run: a teacher rank and a student rank; ``sections`` are laid over it."""
    fields: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(tmp_path / "runs")},
        "data": {
            "train": [str(text_dir / "train.jsonl")],
            "heldout": [str(text_dir / "heldout.jsonl")],
            "row_tokens": 48,
            "heldout_tokens": 480,
            "cache_dir": str(tmp_path / "cache"),
        },
        "teacher": {"model": str(teacher_dir), "ranks": 1},
        "student": {"layers": [0, 3]},
        "targets": {"k": 64},
        "loss": {"hard_weight": 0.0},
        "train": {"steps": 12, "batch_rows": 4, "micro_rows": 2, "lr": 1e-3},
        "deepspeed": {"zero_optimization": {"stage": 1}},
        "stream": {"in_flight": 4, "give_up_seconds": 20},
        "checkpoint": {"every_steps": 5},
        "evaluate": {"efficiency": False},
    }
    for name, section in sections.items():
        fields[name] = {**fields.get(name, {}), **section}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


def start(*arguments: str, log: Path) -> "subprocess.Popen[bytes]":
    """Start ``kdscale ARGUMENTS`` with its output in ``log``."""
    with log.open("ab") as out:
        return subprocess.Popen([*KDSCALE, *arguments], stdout=out, stderr=subprocess.STDOUT, env=os.environ | OURS)


def finish(process: "subprocess.Popen[bytes]", log: Path, *, within_s: float = PATIENCE_S) -> int:
    """Its exit code; a process that does not end in time fails the test with its output."""
    try:
        return process.wait(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)
        raise AssertionError(f"still running after {within_s} s:\n{log.read_text()}") from None


def run(*arguments: str, log: Path, within_s: float = PATIENCE_S) -> int:
    return finish(start(*arguments, log=log), log, within_s=within_s)


def steps(run_directory: Path) -> list[int]:
    """Steps in ``metrics.jsonl``, in its order."""
    path = run_directory / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for_step(run_directory: Path, step: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline, last = time.monotonic() + PATIENCE_S, 0
    while not (done := steps(run_directory)) or done[-1] < step:
        assert process.poll() is None, log.read_text()
        if done and done[-1] != last:
            deadline, last = time.monotonic() + PATIENCE_S, done[-1]
        assert time.monotonic() < deadline, f"no progress behind step {last}, on the way to {step}:\n{log.read_text()}"
        time.sleep(0.1)


def wait_for_file(path: Path, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.is_file():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"{path} was not written:\n{log.read_text()}"
        time.sleep(0.2)


def wait_for_checkpoint(run_directory: Path, step: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until one of step ``step`` or a later one is whole."""
    deadline = time.monotonic() + PATIENCE_S
    while all(
        int(path.parent.name.removeprefix("step-")) < step
        for path in (run_directory / "checkpoints").glob("step-*/MANIFEST.json")
    ):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"no checkpoint from step {step} on:\n{log.read_text()}"
        time.sleep(0.1)


def marked() -> list[psutil.Process]:
    """Living processes of the runs these tests started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("KDSCALE_TEST_SESSION") == MARK:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def marked_running(words: str) -> list[psutil.Process]:
    """Living processes of a run with ``words`` in their command line."""
    found = []
    for process in marked():
        with contextlib.suppress(psutil.NoSuchProcess):
            if words in " ".join(process.cmdline()):
                found.append(process)
    return found


def assert_nothing_left(within_s: float = 10) -> None:
    """No process of a run (so no port and no lock either), no shared memory, no temporary file."""
    deadline = time.monotonic() + within_s
    while left := marked():
        assert time.monotonic() < deadline, [" ".join(process.cmdline()) for process in left]
        time.sleep(0.2)
    # Ray's object store has a name for a moment, other tests' too.
    while shared := set(os.listdir("/dev/shm")) - SHARED_MEMORY_BEFORE:
        assert time.monotonic() < deadline, shared
        time.sleep(0.2)
    # Ray's dashboard leaves its socket when it is killed; no run has one. Any import of PyTorch's compiler makes its cache.
    temporary = [str(path) for path in TEMP.iterdir() if not path.name.startswith(("pymp-", "torchinductor_"))]
    assert temporary == [], temporary
