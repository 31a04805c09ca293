"""A run from config to summary: place, start teacher and student, watch, stop."""

import json
import secrets
import signal
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import ray

from kdscale import log, supervise
from kdscale.cluster.placement import cluster, reserve
from kdscale.config.load import load_resolved
from kdscale.config.schema import RunConfig
from kdscale.display import Display
from kdscale.engine.checkpoint import Checkpoint, newest, set_aside, verify
from kdscale.engine.process import address_in
from kdscale.errors import KdscaleError
from kdscale.metrics import MetricsFile, StepMetrics
from kdscale.prepare import Prepared, corpus_of, prepare, run_identity
from kdscale.stream.directory import DirectoryServer
from kdscale.stream.protocol import Access
from kdscale.student.service import StudentGroup, student_ask
from kdscale.student.worker import StudentSetup
from kdscale.summary import make_summary, measure_models
from kdscale.teacher.replica import ReplicaSetup
from kdscale.teacher.service import TeacherReplica, teacher_ask

_LOG = log.get(__name__)
_POLL_S = 0.25


class Stopped(Exception):
    """The run was asked to stop; a later one goes on from its newest checkpoint."""


def run(config: RunConfig, resume: str, stop: threading.Event, display: Display) -> dict[str, Any]:
    """Train to the end and return the summary. Raises: KdscaleError, Stopped."""
    began = time.monotonic()
    directory = Path(config.run.dir) / config.run.name
    display.phase("reading models and tokenizer")
    prepared = prepare(config)
    checkpoint = find_checkpoint(directory / "checkpoints", resume)
    with ExitStack() as stack:
        display.phase("starting Ray")
        asks = teacher_ask(config.teacher), student_ask(config.student)
        stack.enter_context(cluster(config.cluster, list(asks), supervise.temp_dir()))
        stop_on_signals(stop)
        slots = [stack.enter_context(reserve(ask, config.cluster.wait_seconds)) for ask in asks]

        display.phase("loading the teacher and building the student")
        host, _ = address_in(config.stream.network)
        token = secrets.token_hex(32)
        endpoints = DirectoryServer(host, config.stream.directory_port, token)
        teacher = TeacherReplica(replica_setup(config, prepared, token), slots[0])
        stack.callback(teacher.stop)
        teacher.begin()
        corpus = corpus_of(config, prepared, display.count)
        identity = run_identity(config, prepared, corpus)
        students = StudentGroup(student_setup(config, prepared, identity, directory, checkpoint), slots[1])
        stack.callback(students.kill)
        students.begin()
        teacher_facts = teacher.open(endpoints)
        student_facts = students.start(Access(endpoints.address, token))

        metrics = MetricsFile(directory / "metrics.jsonl", student_facts["start_step"])
        report = watch(teacher, students, stop, config.cluster.grace_seconds, metrics, display)
        teacher_stats = teacher.stats()
    display.phase("measuring size, speed and memory")
    measured = measure_models(config, prepared.teacher_directory, directory / "student", teacher_facts, student_facts)
    summary = make_summary(config, prepared, teacher_facts, teacher_stats, student_facts, report, measured)
    summary["wall_seconds"] = time.monotonic() - began
    (directory / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def replica_setup(config: RunConfig, prepared: Prepared, token: str) -> ReplicaSetup:
    return ReplicaSetup(
        teacher=config.teacher,
        directory=str(prepared.teacher_directory),
        meaning=prepared.meaning,
        network=config.stream.network,
        token=token,
        deterministic=config.run.deterministic,
    )


def student_setup(
    config: RunConfig, prepared: Prepared, identity: dict[str, Any], directory: Path, checkpoint: Checkpoint | None
) -> StudentSetup:
    return StudentSetup(
        config=config,
        meaning=prepared.meaning,
        identity=identity,
        teacher_directory=str(prepared.teacher_directory),
        run_directory=str(directory.absolute()),
        resume_from=str(checkpoint.directory.absolute()) if checkpoint else None,
    )


def watch(
    teacher: TeacherReplica,
    students: StudentGroup,
    stop: threading.Event,
    grace_seconds: float,
    metrics: MetricsFile,
    display: Display,
) -> dict[str, Any]:
    """Show what happens until every student rank has reported; returns rank 0's report.

    Raises:
        TeacherError, StudentError: a rank died; or whatever a rank raised.
        Stopped: ``stop`` was set and the students left, or their grace was over.
    """
    reports: dict[Any, dict[str, Any]] = {}
    deadline: float | None = None
    while len(reports) < len(students.running):
        pending = [call for call in students.running if call not in reports]
        ready, _ = ray.wait([*pending, *teacher.serving], timeout=_POLL_S)
        show(students.events(), metrics, display)
        for call in ready:
            if call in teacher.serving:
                teacher.raise_fault(call)
            reports[call] = students.result(call)
        if stop.is_set() and deadline is None:
            display.phase("stopping: saving a checkpoint")
            students.ask_to_stop()
            deadline = time.monotonic() + grace_seconds
        if deadline is not None and time.monotonic() > deadline:
            raise Stopped(f"not saved within cluster.grace_seconds = {grace_seconds:g}")
    show(students.events(), metrics, display)
    report = reports[students.running[0]]
    if report["stopped"]:
        raise Stopped(f"saved at step {report['step']}")
    return report


def show(events: list[dict[str, Any]], metrics: MetricsFile, display: Display) -> None:
    for event in events:
        match event["kind"]:
            case "step":
                step = StepMetrics(**event["metrics"])
                metrics.write(step)
                display.step(step)
            case "phase":
                display.phase(event["phase"])
            case "checkpoint":
                display.phase(f"saved {event['path']}")


def find_checkpoint(root: Path, resume: str) -> Checkpoint | None:
    """Where to go on from: ``auto`` the newest whole checkpoint, ``never`` none, else the one at that path.

    With ``never``, checkpoints of an earlier run are set aside, not removed.

    Raises:
        CheckpointError: a named checkpoint is damaged, or no checkpoint of several is whole.
    """
    match resume:
        case "auto":
            return newest(root)
        case "never":
            set_aside(root)
            return None
        case path:
            return verify(Path(path))


def stop_on_signals(stop: threading.Event) -> None:
    """SIGTERM and SIGINT set ``stop`` from here on (Ray installs a handler of its own when it starts)."""

    def ask(signum: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)


def main(run_config_file: str, resume: str) -> int:
    """The driver process; its parent is ``kdscale.supervise``. Returns the exit code."""
    log.setup("driver")
    config = load_resolved(Path(run_config_file))
    supervise.follow_supervisor(config.cluster.grace_seconds)
    display = Display(config.train.steps)
    try:
        summary = run(config, resume, threading.Event(), display)
        display.summary(summary)
        return 0
    except Stopped as stopped:
        display.close()
        print(f"kdscale: stopped ({stopped}); the same command goes on from the newest checkpoint", file=sys.stderr)
        return supervise.INTERRUPTED
    except KdscaleError as error:
        display.close()
        print(f"kdscale: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        supervise.leave()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
