"""SIGKILL inside a save, at system calls sampled over the whole of it: what is there before or after is whole."""

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdscale.engine.checkpoint import newest
from kdscale.engine.staging import by_age
from tests.failure import saver_process

KILLS = 40
CALLS = ("mkdir", "openat", "write", "fsync", "rename", "unlink", "unlinkat", "rmdir")
"""What changes a file system; a kill between two of them leaves what the first has made."""
LIMIT_S = 120.0


class Savers:
    """Children of ``saver_process``, one after another, each watched by strace while it saves."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, "-m", saver_process.__name__, str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            cwd=Path(__file__).parents[2],
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._lines.put(line)

    def run(self, *options: str) -> tuple[dict[str, Any], int]:
        """What a child said when it had gone on from the newest checkpoint, and how it ended under ``strace OPTIONS``."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        ready = json.loads(self._lines.get(timeout=LIMIT_S))
        pid = ready["pid"]
        strace = subprocess.Popen(["strace", "-f", "-q", "-p", str(pid), *options], stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + LIMIT_S
            while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
                assert time.monotonic() < deadline, "strace did not attach"
                if strace.poll() is not None:
                    pytest.skip(f"strace may not attach here: {strace.communicate()[1]}")
                time.sleep(0.01)
            os.kill(pid, signal.SIGCONT)
            ended = json.loads(self._lines.get(timeout=LIMIT_S))["ended"]
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            strace.terminate()
            strace.communicate(timeout=30)
        return ready, ended

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def savers(tmp_path: Path) -> Iterator[Savers]:
    if shutil.which("strace") is None:
        pytest.skip("needs strace, which launch/install.sh --test installs as root")
    made = Savers(tmp_path)
    yield made
    made.close()


def calls_of_a_save(trace: str) -> list[tuple[str, int]]:
    """(call, its number among the calls of that name) in the thread that published last, in order."""
    calls = [match.groups() for line in trace.splitlines() if (match := re.match(r"(\d+) +(\w+)\(", line))]
    thread = [pid for pid, name in calls if name == "rename"][-1]
    seen: Counter[str] = Counter()
    found = []
    for pid, name in calls:
        if pid == thread:
            seen[name] += 1
            found.append((name, seen[name]))
    return found


@pytest.mark.slow
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(savers: Savers, tmp_path: Path):
    root, trace, watched = tmp_path / "checkpoints", tmp_path / "trace", f"trace={','.join(CALLS)}"
    assert savers.run("-e", watched, "-o", str(trace))[1] == 0
    # The second child's saves also prune.
    assert savers.run("-e", watched, "-o", str(trace))[1] == 0
    calls = calls_of_a_save(trace.read_text())
    assert {"mkdir", "openat", "write", "fsync", "rename", "unlinkat", "rmdir"} <= {name for name, _ in calls}
    sampled = [calls[number * len(calls) // KILLS] for number in range(KILLS)]
    sampled += [("rename", number) for number in range(1, 1 + sum(name == "rename" for name, _ in calls))]
    before = newest(root)
    outcomes: Counter[str] = Counter()
    for name, number in dict.fromkeys(sampled):
        assert before is not None
        ready, ended = savers.run("-e", watched, "-e", f"inject={name}:signal=KILL:when={number}", "-o", "/dev/null")
        assert (ready["step"], ready["same"]) == (before.step, True), f"did not go on from {before}"
        assert ended == -signal.SIGKILL, f"{name} number {number} was not reached"
        after = newest(root)
        assert after is not None
        assert before.step <= after.step <= before.step + saver_process.SAVES
        outcomes["older" if after.step == before.step else "newer"] += 1
        before = after
    assert sum(outcomes.values()) >= 30
    assert len(outcomes) == 2, f"kills before and after the new one counts: {outcomes}"
    # And one that is left alone tidies up.
    assert savers.run("-e", watched, "-o", "/dev/null")[1] == 0
    assert len(by_age(root)) == saver_process.KEEP
    assert not list(root.glob(".*"))
