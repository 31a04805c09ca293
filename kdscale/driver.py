"""A run from config to summary: place, start teacher and student, watch, stop."""

import json
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray

from kdscale import log, supervise
from kdscale.config.load import load_resolved
from kdscale.display import Display
from kdscale.engine.checkpoint import find
from kdscale.errors import KdscaleError
from kdscale.metrics import StepMetrics
from kdscale.prepare import corpus_of, prepare, require_resumable, run_identity
from kdscale.start import Job, OwnTeacher, ServedTeacher, Stopped, place, start_students, start_teacher
from kdscale.student.service import StudentGroup
from kdscale.summary import make_summary, measure_models

_POLL_S = 0.25


def train(job: Job, resume: str) -> None:
    """Train to the end and leave ``summary.json``. Raises: KdscaleError, Stopped."""
    began, config = time.monotonic(), job.config
    job.display.phase("reading models and tokenizer")
    prepared = prepare(config)
    checkpoint, identity = find(job.directory / "checkpoints", resume), run_identity(config, prepared)
    require_resumable(config, checkpoint, identity)
    with ExitStack() as stack:
        slots = place(job, stack)
        teacher = start_teacher(job, prepared, slots, stack)
        identity["corpus"] = corpus_of(config, prepared, job.display.count).fingerprint
        require_resumable(config, checkpoint, identity)
        students = start_students(job, prepared, identity, checkpoint, slots, stack)
        access = teacher.open()
        facts = students.built()
        students.start("run", access)
        report = watch(job, teacher, students)
    job.display.phase("measuring size, speed and memory")
    measured = measure_models(config, prepared.teacher_directory, job.directory / "student", report, facts)
    summary = make_summary(config, prepared, facts, report, measured)
    summary["wall_seconds"] = time.monotonic() - began
    write_json(job.directory / "summary.json", summary)
    job.display.summary(summary)


def evaluate(job: Job, resume: str) -> None:
    """Held-out quality of the student the config describes, through the served teacher. Raises: KdscaleError, Stopped."""
    prepared = prepare(job.config)
    checkpoint = find(job.directory / "checkpoints", resume) if resume != "never" else None
    identity = run_identity(job.config, prepared)
    require_resumable(job.config, checkpoint, identity)
    with ExitStack() as stack:
        slots = place(job, stack)
        teacher = start_teacher(job, prepared, slots, stack)
        identity["corpus"] = corpus_of(job.config, prepared, job.display.count).fingerprint
        require_resumable(job.config, checkpoint, identity)
        students = start_students(job, prepared, identity, checkpoint, slots, stack)
        access = teacher.open()
        students.built()
        students.start("evaluate", access)
        report = watch(job, teacher, students)
    job.display.close()
    write_json(job.directory / "evaluation.json", report)
    print(json.dumps(report, indent=1))


def serve(job: Job, endpoints_file: Path) -> None:
    """Serve the teacher for runs elsewhere until asked to stop. Raises: KdscaleError, Stopped."""
    prepared = prepare(job.config)
    with ExitStack() as stack:
        teacher = start_teacher(job, prepared, place(job, stack, student=False), stack)
        teacher.open().save(endpoints_file)
        stack.callback(endpoints_file.unlink, missing_ok=True)
        job.display.phase(f"serving; runs elsewhere use --teacher-endpoints {endpoints_file} (Ctrl-C ends)")
        while not job.stop.is_set():
            ended, _ = ray.wait(teacher.serving, timeout=_POLL_S)
            if ended:
                teacher.raise_fault(ended[0])
    raise Stopped("the teacher was asked to")


def watch(job: Job, teacher: OwnTeacher | ServedTeacher, students: StudentGroup) -> dict[str, Any]:
    """Show what happens until every student rank has reported; returns rank 0's report.

    Raises:
        TeacherError, StudentError: a rank died; or whatever a rank raised.
        Stopped: the run was asked to stop, and the students left or their grace was over.
    """
    reports: dict[Any, dict[str, Any]] = {}
    grace_s = job.config.cluster.grace_seconds
    deadline: float | None = None
    while len(reports) < len(students.running):
        pending = [call for call in students.running if call not in reports]
        ready, _ = ray.wait([*pending, *teacher.serving], timeout=_POLL_S)
        events = students.events()
        show(events, job.display)
        for call in ready:
            if call in teacher.serving:
                teacher.raise_fault(call)
            reports[call] = students.result(call)
        if job.stop.is_set() and deadline is None:
            job.display.phase("stopping after the step in progress")
            students.ask_to_stop()
            deadline = time.monotonic() + grace_s
        if any(event["kind"] == "leaving" for event in events):
            teacher.release()
        if deadline is not None and time.monotonic() > deadline:
            raise Stopped(f"nothing was saved within cluster.grace_seconds = {grace_s:g}")
    show(students.events(), job.display)
    report = reports[students.running[0]]
    if report.get("stopped"):
        raise Stopped(f"saved at step {report['step']}")
    return report


def show(events: list[dict[str, Any]], display: Display) -> None:
    for event in events:
        match event["kind"]:
            case "step":
                display.step(StepMetrics(**event["metrics"]))
            case "phase" | "leaving":
                display.phase(event["phase"])
            case "checkpoint":
                display.phase(f"saved {event['path']}")


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n")


def main(flow: str, config_file: str, argument: str, endpoints: str = "") -> int:
    """The driver process; its parent is ``kdscale.supervise``. Returns the exit code."""
    log.setup("driver")
    config = load_resolved(Path(config_file))
    supervise.follow_supervisor(config.cluster.grace_seconds)
    job = Job(config, threading.Event(), Display(config.train.steps), Path(endpoints) if endpoints else None)
    try:
        match flow:
            case "train":
                train(job, argument)
            case "evaluate":
                evaluate(job, argument)
            case "serve":
                serve(job, Path(argument))
            case _:
                raise ValueError(f"flow {flow!r}: train, evaluate or serve")
        return 0
    except Stopped as stopped:
        job.display.close()
        print(f"kdscale: stopped, {stopped}; the same command goes on from the newest checkpoint", file=sys.stderr)
        return supervise.INTERRUPTED
    except KdscaleError as error:
        job.display.close()
        print(f"kdscale: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        job.display.close()
        supervise.leave()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
