"""The lifeline between a supervisor and who follows it, by real processes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdscale import supervise
from kdscale.errors import PlacementError

FOLLOWER = """
import signal, sys, time
from kdscale import supervise
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
supervise.follow_supervisor(60.0)
print("follows", flush=True)
time.sleep(60)
"""
SUPERVISOR = f"""
import pathlib, subprocess, sys, time
from kdscale import supervise
with supervise.owned(pathlib.Path(sys.argv[1])) as run:
    print(run.temp, flush=True)
    child = subprocess.Popen([sys.executable, "-c", {FOLLOWER!r} + "\\nsupervise.leave()"], env=run.environment)
    time.sleep(60)
"""


def follower(run: supervise.Owned) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", FOLLOWER], env=run.environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"follows\n"
    return process


def test_who_follows_is_asked_when_let_go(tmp_path: Path):
    with supervise.owned(tmp_path / "lock") as run:
        process = follower(run)
        time.sleep(0.3)
        assert process.poll() is None
        run.let_go()
        assert process.wait(timeout=10) == 7
        # Who comes later is asked as well.
        assert (
            subprocess.run([sys.executable, "-c", FOLLOWER], env=run.environment, check=False, timeout=20).returncode
            == 7
        )


def test_nothing_is_left(tmp_path: Path):
    with supervise.owned(tmp_path / "lock") as run:
        stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
        command = [sys.executable, "-c", stubborn]
        process = subprocess.Popen(command, env=run.environment, stdout=subprocess.PIPE, start_new_session=True)
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(PlacementError, match="another process works on"), supervise.owned(tmp_path / "lock"):
            pass
    assert process.poll() is not None
    assert not run.temp.exists()


def test_who_follows_notices_a_killed_supervisor_and_tidies(tmp_path: Path):
    code = SUPERVISOR.replace("sys.exit(7)", "(supervise.leave(), sys.exit(7))")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    temp = process.stdout.readline().strip()
    assert process.stdout.readline() == "follows\n"
    process.kill()
    # The follower holds the other end of the pipe too.
    process.communicate(timeout=20)
    assert not Path(temp).exists()
