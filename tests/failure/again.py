"""A run that ends in every way there is, again and again: ``python -m tests.failure.again --times 20``. By hand.

After each end, within 10 s, no process, port, shared memory, temporary file or lock of it may be left, and the same command
must go on at once.
"""

import argparse
import itertools
import json
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import make_model, make_tokenizer, write_text
from tests.failure.runs import config_of, last_step, ranks_of, trained, wait_for_progress
from tests.runs import assert_nothing_left, finish, marked_running, start

ENDLESS = 1_000_000
KILLED = 128 + signal.SIGKILL


def signalled(number: signal.Signals) -> Callable[["subprocess.Popen[bytes]"], None]:
    return lambda process: process.send_signal(number)


def kill_driver(process: "subprocess.Popen[bytes]") -> None:
    (driver,) = marked_running("kdscale.driver")
    driver.kill()


def lose_a_rank(process: "subprocess.Popen[bytes]") -> None:
    random.choice([*ranks_of("TeacherRank"), *ranks_of("StudentRank")]).kill()


def lose_the_cluster(process: "subprocess.Popen[bytes]") -> None:
    """One of the two processes without which Ray's head is none."""
    daemons = [one for one in marked_running("/ray/core/src/ray/") if one.name() in ("gcs_server", "raylet")]
    random.choice(daemons).kill()


ENDS: dict[str, tuple[Callable[["subprocess.Popen[bytes]"], None], int]] = {
    "SIGINT": (signalled(signal.SIGINT), 130),
    "SIGTERM": (signalled(signal.SIGTERM), 130),
    "driver SIGKILL": (kill_driver, KILLED),
    "supervisor SIGKILL": (signalled(signal.SIGKILL), -signal.SIGKILL),
    "a rank lost for good": (lose_a_rank, 1),
    "Ray's head SIGKILL": (lose_the_cluster, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kdscale-again-") as scratch:
        root = Path(scratch)
        teacher, text = root / "teacher", root / "text"
        text.mkdir()
        make_model("llama").save_pretrained(teacher)
        make_tokenizer(teacher)
        none = {"restarts": 0}
        config = config_of(root, teacher, write_text(text), teacher=none, student=none, train={"steps": ENDLESS})
        log, directory = root / "log", root / "runs" / "tiny"
        slowest_s = 0.0
        for number, (name, (end, code)) in enumerate(itertools.islice(itertools.cycle(ENDS.items()), options.times)):
            process = start("train", str(config), log=log)
            wait_for_progress(directory, process, log, num_steps=25)
            end(process)
            began = time.monotonic()
            assert finish(process, log, within_s=40) == code, log.read_text()
            exited_s = time.monotonic() - began
            assert_nothing_left(within_s=15 if code < 0 else 10)
            gone_s = time.monotonic() - began
            slowest_s = max(slowest_s, gone_s)
            print(f"{number + 1}: {name} at step {last_step(directory)}: {exited_s:.1f} s, {gone_s:.1f} s", flush=True)
        total = last_step(directory)
        process = start("train", str(config), f"train.steps={total + 10}", log=log)
        assert finish(process, log) == 0, log.read_text()
        assert_nothing_left()
        assert [step for step, _, _ in trained(directory)] == list(range(1, total + 11)), "each step once, in order"
        print(json.dumps({"ends": options.times, "steps": total + 10, "slowest_seconds": round(slowest_s, 1)}))


if __name__ == "__main__":
    main()
