"""Real ranks for tests: one process each, joined over a store on loopback."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from kdscale.engine import process
from tests.runs import PATIENCE_S, TEMP


def run_ranks(module: str, world: int, *arguments: str, timeout_s: float = PATIENCE_S, killed: bool = False) -> None:
    """Run ``-m module RANK WORLD PORT_FILE ARGUMENTS...`` on ``world`` processes; a failure shows that rank's output.

    With ``killed`` they must end by SIGKILL, all of them or the others by what they then see.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    port_file = Path(arguments[0]).with_suffix(".port")
    port_file.unlink(missing_ok=True)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(world), str(port_file), *arguments],
            env=environment,
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        deadline = time.monotonic() + timeout_s
        outputs = [rank.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if killed:
        codes = [rank.returncode for rank in ranks]
        assert -signal.SIGKILL in codes, "\n".join(outputs)
        assert 0 not in codes
        return
    for number, (rank, output) in enumerate(zip(ranks, outputs, strict=True)):
        assert rank.returncode == 0, f"rank {number}:\n{output}"


def join(rank: int, world: int, port_file: Path):
    """Become a rank of the group; rank 0 leaves the store's port in a file. Returns the device."""
    member = process.Member(rank, world)
    if rank == 0:
        address = member.open_store("127.0.0.0/8", None)
        aside = port_file.with_suffix(".partial")
        aside.write_text(str(address[1]))
        aside.rename(port_file)
    else:
        while not port_file.exists():
            time.sleep(0.05)
        address = ("127.0.0.1", int(port_file.read_text()))
    return member.join(address, "127.0.0.0/8", None, 300.0, 300.0, 0)


def leave() -> NoReturn:
    """End this rank as kdscale ends its own: at once, since threads of the libraries that nobody waits for any more are not
    always gone before what they stand on is."""
    process.leave_group()
    shutil.rmtree(TEMP, ignore_errors=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
