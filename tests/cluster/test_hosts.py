"""A whole job over three hosts, as a user starts it, and what becomes of it when a link fails."""

import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from kdscale.credentials import ACCESS_FILE
from kdscale.engine.checkpoint import newest
from kdscale.stream.protocol import Access
from tests.cluster.hosts import Host, hosts, missing
from tests.cluster.nodes import Nodes, config_of, processes, ranks, three_nodes
from tests.failure.runs import trained, wait_for_progress, wait_for_words
from tests.runs import assert_nothing_left, finish, steps, wait_for_step

# Network namespaces need root, `ip` and `tc`: the reason names what is missing. CI has them, and runs all of this.
ABSENT = missing()
# Alone: three Ray nodes fill two cores, and how soon a lost link is noticed is measured in seconds.
pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]
OUTAGE_S = 8.0
STEPS = 40
"""Of the job whose links fail; the one that strangers knock at trains on until they are done."""
KEY_FILE = ".checkpoint-key"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with three_nodes(tmp_path_factory.mktemp("hosts")) as nodes:
        yield nodes
    assert_nothing_left()


@dataclass
class Job:
    """The job when no link fails; strangers knock at its doors meanwhile; then it is stopped, and goes on to its end."""

    losses: list[tuple[int, str, float]]
    """With steps and rows."""
    secrets: dict[str, str]
    shown: dict[str, str]
    """What others can come to see, by where: processes and actors while it ran, then what was written."""
    strangers: dict[str, Any]
    """What they found."""
    steps_meanwhile: int


@pytest.fixture(scope="module")
def job(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, text_dir: Path) -> Job:
    tmp_path = tmp_path_factory.mktemp("job")
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    config = config_of(tmp_path, teacher_dir, text_dir, nodes, evaluate={"quality": True}, train={"steps": 4000})
    process = nodes.train(config, log=log)
    wait_for_step(directory, 1, process, log)
    assert [len(ranks("TeacherRank", host)) for host in nodes.all] == [1, 1, 0]
    assert [len(ranks("StudentRank", host)) for host in nodes.all] == [0, 0, 2]
    access = Access.load(directory / ACCESS_FILE)
    assert access.credentials is not None
    secrets = {
        "the run's token": access.token,
        "any key": "PRIVATE KEY",
        "its key": access.credentials.key_pem.split("\n")[1],
    }
    shown = {f"process {one.pid}": words_of(one) for host in nodes.all for one in processes(host)}
    before = steps(directory)[-1]
    strangers = nodes.strangers(directory / ACCESS_FILE, scratch=tmp_path)
    steps_meanwhile = steps(directory)[-1] - before
    shown["ray list actors"] = nodes.ray("list", "actors", "--detail", scratch=tmp_path)
    assert "StudentRank" in shown["ray list actors"]
    wait_for_step(directory, STEPS, process, log)
    process.send_signal(signal.SIGTERM)
    assert finish(process, log, within_s=60) == 130, log.read_text()
    last = f"train.steps={steps(directory)[-1] + 2}"
    assert finish(nodes.train(config, last, log=log), log) == 0, log.read_text()
    assert (directory / "summary.json").is_file()
    assert "not encrypted" not in log.read_text(), "Ray has TLS here"
    secrets["Ray's token"] = Path(nodes.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    secrets["Ray's key"] = Path(nodes.head.environment["RAY_TLS_SERVER_KEY"]).read_text().split("\n")[1]
    secrets["the checkpoints' key"] = (directory / KEY_FILE).read_text().strip()
    for place in (tmp_path, *(host.files for host in nodes.all)):
        for path in filter(Path.is_file, place.rglob("*")):
            if path.name != KEY_FILE:
                shown[str(path)] = path.read_text(errors="replace")
    return Job(trained(directory), secrets, shown, strangers, steps_meanwhile)


def words_of(process: psutil.Process) -> str:
    """Arguments and environment."""
    try:
        return " ".join([*process.cmdline(), *process.environ().values()])
    except psutil.NoSuchProcess:
        return ""


def test_a_job_over_three_hosts(job: Job):
    assert [step for step, _, _ in job.losses] == list(range(1, len(job.losses) + 1))


def test_strangers_open_none_of_its_doors(job: Job):
    """Two teacher ranks and the directory; the teacher's sequencer and rendezvous. The students share a host."""
    assert job.strangers["flight"] == 3
    assert job.strangers["tunnels"] == 2
    assert job.strangers["let_in"] == []
    assert job.steps_meanwhile > 0


def test_its_secrets_are_shown_nowhere(job: Job):
    assert {"log", "metrics.jsonl", "MANIFEST.json", "raylet.out"} <= {Path(where).name for where in job.shown}
    assert all(len(secret) >= len("PRIVATE KEY") for secret in job.secrets.values())
    leaks = [
        (name, where) for name, secret in job.secrets.items() for where, text in job.shown.items() if secret in text
    ]
    assert leaks == []


def test_a_link_fails_for_a_while(
    nodes: Nodes,
    job: Job,
    tmp_path: Path,
    teacher_dir: Path,
    text_dir: Path,
):
    """First the students are cut off, then half of the teacher; each time the run goes on, and learns the same."""
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    config = config_of(tmp_path, teacher_dir, text_dir, nodes, evaluate={"quality": True}, train={"steps": STEPS})
    process = nodes.train(config, log=log)
    for host in (nodes.third, nodes.second):
        wait_for_progress(directory, process, log)
        with host.unplugged():
            time.sleep(OUTAGE_S)
    assert finish(process, log) == 0, log.read_text()
    assert trained(directory) == job.losses[:STEPS]
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["canary"].startswith("ok: ")
    assert min(summary["teacher_tokens_per_rank"]) > 0
    assert summary["kl_after"] < summary["kl_before"]
    assert "rebuilding replica-0 of the teacher" in log.read_text(), "half of it did not answer"
    assert "starting the student again" not in log.read_text(), "its heartbeat may be later than that"
    assert_ranks_gone(nodes)


@pytest.mark.parametrize(
    ("cut", "named"),
    [
        ("second", r"TeacherError: teacher, rank [01] has not answered for"),
        ("third", r"StudentError: student, rank [01] has not answered for"),
    ],
)
def test_a_link_fails_for_ever(nodes: Nodes, cut: str, named: str, tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """With no restart left, a typed error that names the rank, soon."""
    log, directory = tmp_path / "log", tmp_path / "runs" / "tiny"
    config = config_of(
        *(tmp_path, teacher_dir, text_dir, nodes),
        train={"steps": 4000},
        teacher={"restarts": 0},
        student={"restarts": 0, "heartbeat_seconds": 10},
    )
    process = nodes.train(config, log=log)
    wait_for_progress(directory, process, log)
    host: Host = getattr(nodes, cut)
    with host.unplugged():
        began = time.monotonic()
        assert finish(process, log, within_s=60) == 1, log.read_text()
        assert time.monotonic() - began < 30, log.read_text()
        assert re.search(named, log.read_text()), log.read_text()
        assert_ranks_gone(nodes, besides=host)
        assert newest(directory / "checkpoints") is not None
    # TCP tries again ever more seldom: the host that was cut off may hear of the end late.
    assert_ranks_gone(nodes, within_s=30)


def assert_ranks_gone(nodes: Nodes, besides: Host | None = None, within_s: float = 10) -> None:
    there = [host for host in nodes.all if host is not besides]
    deadline = time.monotonic() + within_s
    while left := [*ranks("TeacherRank", *there), *ranks("StudentRank", *there)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def test_an_open_cluster_is_refused(tmp_path: Path, teacher_dir: Path, text_dir: Path):
    """One that others can reach and that asks for no token."""
    log = tmp_path / "log"
    with hosts(1) as (host,):
        nodes = Nodes(host, host, host, {"RAY_AUTH_MODE": "disabled"})
        ray = [str(Path(sys.prefix) / "bin" / "ray"), "start", "--head", "--node-ip-address", host.address]
        ray += ["--include-dashboard=false", "--disable-usage-stats", "--num-cpus=4", "--block"]
        head = nodes.start(host, *ray, "--temp-dir", host.environment["KDSCALE_RAY_TEMP"], log=log)
        try:
            wait_for_words("Ray runtime started", head, log, 60)
            process = nodes.train(config_of(tmp_path, teacher_dir, text_dir, nodes), log=log)
            assert finish(process, log, within_s=90) == 1, log.read_text()
            found = log.read_text()
            assert (
                f"PlacementError: the Ray cluster of {host.address}:6379 listens at {host.address} and takes" in found
            )
            assert "start it with RAY_AUTH_MODE=token" in found
        finally:
            head.terminate()
            finish(head, log, within_s=30)
