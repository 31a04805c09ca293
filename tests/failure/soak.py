"""A run under random faults, against the same run without: ``python -m tests.failure.soak --minutes 10``. By hand.

Teacher ranks, student ranks and the driver are killed or stopped at random moments; a dead driver is started again with the
same command. In the end every step must have been trained once, on the same rows, with the same loss to the last bit.
Goodput is how fast the steps came, relative to the run without faults (start-up included in both).
"""

import argparse
import json
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.conftest import make_model, make_tokenizer, write_text
from tests.failure.runs import config_of, last_step, trained
from tests.runs import assert_nothing_left, marked_running, start, wait_for_step

FAULTS = {
    "teacher SIGKILL": ("ray::TeacherRank", signal.SIGKILL),
    "teacher SIGSEGV": ("ray::TeacherRank", signal.SIGSEGV),
    "teacher SIGSTOP": ("ray::TeacherRank", signal.SIGSTOP),
    "student SIGKILL": ("ray::StudentRank", signal.SIGKILL),
    "student SIGSTOP": ("ray::StudentRank", signal.SIGSTOP),
    "driver SIGKILL": ("kdscale.driver", signal.SIGKILL),
}
ENDLESS = 1_000_000


def strike(chance: random.Random) -> str | None:
    """One fault to one process that runs now; none where there is no process of the chosen kind."""
    name = chance.choice(list(FAULTS))
    words, number = FAULTS[name]
    victims = marked_running(words)
    if not victims:
        return None
    chance.choice(victims).send_signal(number)
    return name


def disturbed(config: Path, log: Path, directory: Path, minutes: float, every_s: float, seed: int) -> Counter[str]:
    """Train for ``minutes`` under faults, then stop; returns how many faults of each kind there were."""
    chance, faults = random.Random(seed), Counter[str]()
    process = start("train", str(config), log=log)
    end = time.monotonic() + minutes * 60
    next_fault = time.monotonic() + every_s
    while time.monotonic() < end or last_step(directory) == 0:
        if process.poll() is not None:
            assert process.returncode == 128 + signal.SIGKILL, f"ended with {process.returncode}:\n{log.read_text()}"
            assert_nothing_left()
            process = start("train", str(config), log=log)
        if time.monotonic() >= next_fault:
            if (name := strike(chance)) is not None:
                faults[name] += 1
                print(f"{time.strftime('%H:%M:%S')} {name} at step {last_step(directory)}", flush=True)
            next_fault = time.monotonic() + every_s * chance.uniform(0.5, 1.5)
        time.sleep(0.2)
    stop(process, log)
    return faults


def stop(process: "subprocess.Popen[bytes]", log: Path) -> None:
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=60)
    assert code in (130, 128 + signal.SIGKILL), f"ended with {code}:\n{log.read_text()}"
    assert_nothing_left()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=20, help="seconds between faults, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kdscale-soak-") as scratch:
        root = Path(scratch)
        teacher, text = root / "teacher", root / "text"
        text.mkdir()
        make_model("llama").save_pretrained(teacher)
        make_tokenizer(teacher)
        config = config_of(
            root,
            teacher,
            write_text(text),
            teacher={"restarts": ENDLESS, "restart_forget_seconds": 1, "replicas": options.replicas},
            student={"restarts": ENDLESS, "restart_forget_seconds": 1, "heartbeat_seconds": 5},
            train={"steps": ENDLESS},
        )
        log, directory = root / "log", root / "runs" / "tiny"
        began = time.monotonic()
        faults = disturbed(config, log, directory, options.minutes, options.every, options.seed)
        disturbed_s = time.monotonic() - began
        faulty = trained(directory)

        log, plain = root / "plain.log", root / "runs" / "plain"
        began = time.monotonic()
        process = start("train", str(config), "run.name=plain", log=log)
        wait_for_step(plain, len(faulty), process, log)
        plain_s = time.monotonic() - began
        stop(process, log)
        assert [step for step, _, _ in faulty] == list(range(1, len(faulty) + 1)), "each step once, in order"
        assert trained(plain)[: len(faulty)] == faulty, "the same rows and losses, bit for bit"
        report = {
            "steps": len(faulty),
            "faults": dict(faults),
            "disturbed_seconds": round(disturbed_s, 1),
            "undisturbed_seconds": round(plain_s, 1),
            "goodput": round(plain_s / disturbed_s, 3),
            "bit_identical": True,
        }
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
