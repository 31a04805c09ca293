"""What the tests of faults have in common: one deterministic run, its ranks, and how it went."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import xxhash

from kdscale.config import load_config
from kdscale.data.corpus import build_corpus
from kdscale.data.loader import Loader
from kdscale.data.tokenizer import load_tokenizer
from kdscale.engine.settings import batch_cut
from tests.runs import PATIENCE_S, marked_running, steps, write_config

# Of a machine of two cores that runs the rest of the run as well.
SLACK_S = 3.0
NOTICE_S = 5.0 + SLACK_S
# For what has no limit of its own: starting Ray and a group of ranks, on a machine that does much else.
START_S = float(PATIENCE_S)


def config_of(tmp_path: Path, teacher_dir: Path, text_dir: Path, **sections: dict[str, Any]) -> Path:
    """Deterministic, two teacher ranks, one student rank, and a learning rate that does not depend on ``train.steps``."""
    fields: dict[str, dict[str, Any]] = {
        "run": {"deterministic": True},
        "train": {"steps": 1_000_000, "batch_rows": 4, "micro_rows": 2, "schedule": "constant"},
        "teacher": {"ranks": 2, "restart_wait_seconds": 0.2},
        "student": {"restart_wait_seconds": 0.2},
        "checkpoint": {"every_steps": 20},
        "evaluate": {"quality": False},
    }
    merged = {name: fields.get(name, {}) | sections.get(name, {}) for name in fields.keys() | sections.keys()}
    return write_config(tmp_path, teacher_dir, text_dir, **merged)


def ranks_of(actor: str) -> list[psutil.Process]:
    """Living processes of an actor class, the oldest first."""
    found = {process.pid: process for process in marked_running(f"ray::{actor}")}
    # A child has its parent's name until it is what it was started for.
    ranks = [process for process in found.values() if parent_of(process) not in found]
    return sorted(ranks, key=lambda process: process.create_time())


def parent_of(process: psutil.Process) -> int | None:
    try:
        return process.ppid()
    except psutil.NoSuchProcess:
        return None


def trained(run_directory: Path) -> list[tuple[int, str, float]]:
    """Step, digest of its rows, and loss, as they stand in ``metrics.jsonl``."""
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [(row["step"], row["rows_digest"], row["loss"]) for row in rows]


def rows_of(config_file: Path, num_steps: int) -> list[str]:
    """The digest of the rows that each of the first ``num_steps`` steps has to train on."""
    config = load_config(config_file, [])
    tokenizer = load_tokenizer(config.teacher.model)
    corpus = build_corpus(config.data, tokenizer, lambda done, total, what: None)
    cut = batch_cut(config)
    loader = Loader(corpus.train, config.data.packing, config.data.row_tokens, cut.rows, config.run.seed)
    return [xxhash.xxh3_64_hexdigest(loader.batch(number).ids_RL.tobytes()) for number in range(num_steps)]


def wait_for_words(words: str, process: "subprocess.Popen[bytes]", log: Path, within_s: float, behind: int = 0) -> int:
    """Wait until ``words`` stand in the log behind character ``behind``; returns where they end."""
    deadline = time.monotonic() + within_s
    while (found := log.read_text().find(words, behind)) < 0:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"{words!r} not within {within_s} s:\n{log.read_text()[behind:]}"
        time.sleep(0.05)
    return found + len(words)


def wait_for_ranks(
    actor: str, count: int, others: list[psutil.Process], process: "subprocess.Popen[bytes]", log: Path
) -> list[psutil.Process]:
    """The processes of an actor class once there are ``count`` besides ``others``."""
    deadline = time.monotonic() + START_S
    while len(found := [one for one in ranks_of(actor) if one not in others]) < count:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"{len(found)} of {count} {actor}:\n{log.read_text()}"
        time.sleep(0.05)
    return found


def wait_for_progress(run_directory: Path, process: "subprocess.Popen[bytes]", log: Path, num_steps: int = 5) -> None:
    """Wait until ``num_steps`` more are trained than before; a student that starts again first goes back."""
    deadline = time.monotonic() + START_S
    last, more = last_step(run_directory), 0
    while more < num_steps:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"no progress behind step {last}:\n{log.read_text()}"
        time.sleep(0.1)
        now = last_step(run_directory)
        more, last = more + max(0, now - last), now


def last_step(run_directory: Path) -> int:
    return max(steps(run_directory), default=0)
