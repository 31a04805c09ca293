import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdscale.roster import Attendee, Roster

RANK = """
import os, sys, time
from kdscale import roster, supervise
signed = roster.sign_in(supervise.temp_dir())
if len(sys.argv) > 1:
    signed.out(int(sys.argv[1]))
    os._exit(int(sys.argv[1]))
time.sleep(60)
"""


def rank(number: int, directory: Path | None, *code: str) -> "subprocess.Popen[bytes]":
    given = {} if directory is None else {"KDSCALE_TEMP_DIR": str(directory)}
    return subprocess.Popen([sys.executable, "-c", RANK, *code], env=os.environ | given | {"RANK": str(number)})


def wait_for(roster: Roster, ranks: int) -> None:
    deadline = time.monotonic() + 20
    while len(roster.ranks) < ranks:
        assert time.monotonic() < deadline
        roster.look()
        time.sleep(0.05)


@pytest.mark.parametrize("reaped", [True, False])
def test_who_dies_by_a_signal_is_silent(tmp_path: Path, reaped: bool):
    """Also while its parent has not asked for its exit code yet."""
    process, roster = rank(3, tmp_path), Roster(tmp_path)
    wait_for(roster, 1)
    assert roster.alive == [Attendee(3, process.pid)]
    process.send_signal(signal.SIGKILL)
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    roster.look()
    assert (roster.alive, [one.rank for one in roster.silent], roster.failed) == ([], [3], [])
    process.wait()


def test_exit_codes_are_told(tmp_path: Path):
    for process in (rank(0, tmp_path, "0"), rank(1, tmp_path, "7")):
        process.wait()
    roster = Roster(tmp_path)
    roster.look()
    assert (roster.alive, roster.silent) == ([], [])
    assert [(one.rank, one.code) for one in roster.failed] == [(1, 7)]
    assert roster.ranks[0].code == 0


def test_a_rank_without_supervisor_signs_nothing(tmp_path: Path):
    process = rank(0, None, "5")
    assert process.wait() == 5
    process = rank(0, tmp_path / "gone", "5")
    assert process.wait() == 5
    assert list(tmp_path.iterdir()) == []
