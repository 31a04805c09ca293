"""Several replicas of the teacher: one that is lost, joins or leaves disturbs nobody, and changes no number."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kdscale.stream.directory import list_endpoints
from kdscale.stream.protocol import Access, Endpoint, call, connect
from tests.conftest import make_model, make_tokenizer
from tests.failure.runs import (
    NOTICE_S,
    START_S,
    config_of,
    last_step,
    ranks_of,
    rows_of,
    trained,
    wait_for_progress,
    wait_for_words,
)
from tests.runs import assert_nothing_left, finish, marked, marked_running, run, start, wait_for_file, wait_for_step

pytestmark = pytest.mark.slow

LEASE_LOST_S = 5.0 + 3.0


def joined(access: Access) -> list[Endpoint]:
    return [one for one in list_endpoints(access).endpoints if one.replica.startswith("joined-")]


def wait_for_joined(access: Access, count: int, within_s: float, log: Path) -> list[Endpoint]:
    deadline = time.monotonic() + within_s
    while len(found := joined(access)) != count:
        assert time.monotonic() < deadline, f"{found} have joined, not {count}:\n{log.read_text()}"
        time.sleep(0.1)
    return found


def tokens_of(access: Access, endpoint: Endpoint) -> int:
    with connect(endpoint.address, access.credentials) as client:
        stats: dict[str, Any] = call(client, "stats", access.token, 10)
    return int(stats["tokens"])


@pytest.fixture(autouse=True)
def leave_nothing() -> Iterator[None]:
    """A test that fails half-way has stopped processes, which no later one may find."""
    yield
    for process in marked():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def test_replicas_come_and_go_while_a_run_trains(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    config = config_of(
        tmp_path,
        teacher_dir,
        text_dir,
        teacher={"ranks": 1, "replicas": 2, "restart_wait_seconds": 4},
        # Longer than the test: whoever stalls here has not gone elsewhere.
        stream={"stall_seconds": 300, "give_up_seconds": 20},
    )
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    process = start("train", str(config), log=log)
    access_file = directory / "access.json"
    wait_for_file(access_file, process, log)
    assert access_file.stat().st_mode & 0o077 == 0
    wait_for_step(directory, 10, process, log)
    access = Access.load(access_file)

    # One of two replicas stops; the other is asked at once, and training goes on while the first is rebuilt.
    while len(list_endpoints(access).endpoints) < 2:
        time.sleep(0.1)
        assert process.poll() is None, log.read_text()
    victim = ranks_of("TeacherRank")[0]
    victim.send_signal(signal.SIGSTOP)
    read = wait_for_words("of the teacher (restart 1 of 3)", process, log, NOTICE_S)
    wait_for_progress(directory, process, log, 10)
    listing = list_endpoints(access)
    assert (len(listing.endpoints), len(listing.rebuilding)) == (1, 1), "trained on while a replica was rebuilt"
    wait_for_words("of the teacher serves again (generation 1)", process, log, START_S, read)
    compared = last_step(directory)

    # Another one joins, is asked, and leaves after what it has in hand.
    join_log = tmp_path / "join.log"
    joiner = start("teacher", str(config), "teacher.replicas=1", "--join", str(directory), log=join_log)
    (endpoint,) = wait_for_joined(access, 1, START_S, join_log)
    deadline = time.monotonic() + 30
    while tokens_of(access, endpoint) < 500:
        assert time.monotonic() < deadline, "the replica that has joined is not asked"
        time.sleep(0.2)
    joiner.send_signal(signal.SIGTERM)
    wait_for_joined(access, 0, 5, join_log)
    assert finish(joiner, join_log, within_s=20) == 130
    assert endpoint.address not in log.read_text(), "no request failed there"

    # One that joins and is gone without a word is forgotten when its lease is over.
    joiner = start("teacher", str(config), "teacher.replicas=1", "--join", str(access_file), log=join_log)
    (endpoint,) = wait_for_joined(access, 1, START_S, join_log)
    stopped = [one for one in marked_running("--join") + marked_running("kdscale.driver join")]
    rank = max(ranks_of("TeacherRank"), key=lambda one: one.create_time())
    for one in [*stopped, rank]:
        one.send_signal(signal.SIGSTOP)
    wait_for_joined(access, 0, LEASE_LOST_S, join_log)
    wait_for_progress(directory, process, log, 10)
    for one in [*stopped, rank]:
        one.send_signal(signal.SIGCONT)
    joiner.send_signal(signal.SIGTERM)
    assert finish(joiner, join_log, within_s=30) == 130

    # A teacher of another meaning is turned away before it starts anything.
    other = tmp_path / "other"
    make_model("llama", seed=1).save_pretrained(other)
    make_tokenizer(other)
    behind = len(join_log.read_text())
    assert run("teacher", str(config), f"teacher.model={other}", "--join", str(directory), log=join_log) == 1
    said = join_log.read_text()[behind:]
    assert "IdentityError" in said
    assert "starting Ray" not in said

    # One that outlives the run ends with it.
    joiner = start("teacher", str(config), "teacher.replicas=1", "--join", str(directory), log=join_log)
    wait_for_joined(access, 1, START_S, join_log)
    process.send_signal(signal.SIGTERM)
    assert finish(process, log, within_s=20) == 130, log.read_text()
    assert finish(joiner, join_log, within_s=30) == 0, join_log.read_text()
    assert not access_file.exists()
    assert_nothing_left()

    faulty = trained(directory)
    assert [step for step, _, _ in faulty] == list(range(1, len(faulty) + 1)), "each step once, in order"
    assert [digest for _, digest, _ in faulty] == rows_of(config, len(faulty)), "on the rows of its number"
    plain, plain_log = tmp_path / "runs" / "plain", tmp_path / "plain.log"
    process = start("train", str(config), "run.name=plain", "teacher.replicas=1", log=plain_log)
    wait_for_step(plain, compared, process, plain_log)
    process.send_signal(signal.SIGTERM)
    assert finish(process, plain_log, within_s=20) == 130
    assert trained(plain)[:compared] == faulty[:compared], "while a replica was lost, bit for bit"
    assert_nothing_left()
