"""A run from config to summary: place, start teacher and student, watch, stop."""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray

from kdscale import log, supervise
from kdscale.cluster.restarts import Restarts
from kdscale.config.load import dump_resolved, load_resolved
from kdscale.credentials import ACCESS_FILE
from kdscale.display import Display
from kdscale.engine.checkpoint import Checkpoint
from kdscale.errors import KdscaleError, StudentError
from kdscale.generate import generate
from kdscale.mirror import find
from kdscale.on_policy.service import RolloutGuard
from kdscale.prepare import Prepared, corpus_of, prepare, require_resumable, run_identity
from kdscale.serve import join, record, serve
from kdscale.start import Job, Slots, Stopped, Teacher, place, start_rollouts, start_students, start_teacher
from kdscale.stream.recording import Provenance, begin, require_provenance
from kdscale.stream.whole import needs_no_teacher
from kdscale.student.service import StudentGroup
from kdscale.summary import make_summary, measure_models
from kdscale.supervise import filling
from kdscale.waits import POLL_S, look, ready, show

_LOG = log.get("kdscale.driver")  # which runs as __main__


def train(job: Job, resume: str) -> None:
    """Train to the end and leave ``summary.json``. Raises: KdscaleError, Stopped."""
    began, config = time.monotonic(), job.config
    job.display.phase("reading models and tokenizer")
    prepared = prepare(config)
    checkpoint, identity = find(config, resume), run_identity(config, prepared)
    require_resumable(config, checkpoint, identity)
    with ExitStack() as stack:
        if config.targets.recording is not None and not needs_no_teacher(config.targets):
            stack.enter_context(filling(Path(config.targets.recording)))
        slots = place(job, stack, rollouts=True)
        teacher = start_teacher(job, prepared, slots, stack)
        teacher.invite(job.directory / ACCESS_FILE, stack)
        identity["corpus"] = corpus_of(config, prepared, job.display.count).fingerprint
        require_resumable(config, checkpoint, identity)
        dump_resolved(config, job.directory / "config.yaml")
        if config.targets.recording is not None:
            wanted = Provenance.of(config, prepared.meaning, identity["corpus"])
            agree = require_provenance if config.targets.source == "recording" else begin
            agree(Path(config.targets.recording), wanted)
        student = config.student
        restarts = Restarts(student.restarts, student.restart_wait_seconds, student.restart_forget_seconds)
        # Who named a checkpoint goes on from it until this try has one of its own: newer ones may be of another try before.
        again = "auto" if resume == "never" else resume

        def saved() -> None:
            nonlocal again
            again = "auto"
            # What only trains and is lost, however long it takes, would come to nothing for ever.
            restarts.serves()

        while True:
            try:
                facts, report = train_students(job, prepared, identity, checkpoint, slots, teacher, saved)
                break
            except StudentError as fault:
                back_off(job, fault, restarts)
                checkpoint = find(config, again)
    job.display.phase("measuring size, speed and memory")
    measured = measure_models(config, prepared.teacher_directory, job.directory / "student", report, facts)
    summary = make_summary(config, prepared, facts, report, measured)
    summary |= {"student_restarts": restarts.total, "wall_seconds": time.monotonic() - began}
    write_json(job.directory / "summary.json", summary)
    job.display.summary(summary)


def train_students(
    job: Job,
    prepared: Prepared,
    identity: dict[str, Any],
    checkpoint: Checkpoint | None,
    slots: Slots,
    teacher: Teacher,
    saved: Callable[[], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One life of the student ranks, from ``checkpoint`` to the end; returns rank 0's facts and its report. ``saved`` is called
    whenever there is another checkpoint.

    Raises: StudentError when they are lost; KdscaleError, Stopped.
    """
    with ExitStack() as stack:
        try:
            started = start_rollouts(job, prepared, identity["corpus"], checkpoint, slots, stack)
            rollouts, exchange = started or (None, None)
            meanwhile = partial(look, job, teacher)
            students = start_students(job, prepared, identity, checkpoint, slots, stack, meanwhile, exchange)
            facts = ready(job, teacher, students)
            students.start("run", teacher.access)
            return facts, watch(job, teacher, students, rollouts, saved)
        except StudentError as fault:
            # Said before what is left of the group is killed, which takes its time.
            _LOG.warning("the student is lost: %s", fault)
            raise


def back_off(job: Job, fault: StudentError, restarts: Restarts) -> None:
    """Wait before the student starts again. Raises: StudentError when no restart is left; Stopped."""
    if job.stop.is_set():
        raise Stopped(f"and the student was lost: {fault}")
    if not restarts.spend():
        raise StudentError(f"{fault}; no restart is left (student.restarts = {restarts.allowed})")
    job.display.phase(f"starting the student again from its newest checkpoint ({restarts}) after {restarts.wait_s:g} s")
    if job.stop.wait(restarts.wait_s):
        raise Stopped("before the student was started again")


def evaluate(job: Job, resume: str) -> None:
    """Held-out quality of the student the config describes, through the served teacher. Raises: KdscaleError, Stopped."""
    prepared = prepare(job.config)
    checkpoint = find(job.config, resume) if resume != "never" else None
    identity = run_identity(job.config, prepared)
    require_resumable(job.config, checkpoint, identity)
    with ExitStack() as stack:
        slots = place(job, stack)
        teacher = start_teacher(job, prepared, slots, stack)
        identity["corpus"] = corpus_of(job.config, prepared, job.display.count).fingerprint
        require_resumable(job.config, checkpoint, identity)
        students = start_students(job, prepared, identity, checkpoint, slots, stack, partial(look, job, teacher))
        ready(job, teacher, students)
        students.start("evaluate", teacher.access)
        report = watch(job, teacher, students)
    job.display.close()
    write_json(job.directory / "evaluation.json", report)
    print(json.dumps(report, indent=1))


def watch(
    job: Job,
    teacher: Teacher,
    students: StudentGroup,
    rollouts: RolloutGuard | None = None,
    saved: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Show what happens until every student rank has reported; returns rank 0's report.

    Raises:
        TeacherError: the teacher is lost, and not to be rebuilt.
        OnPolicyError: so is who writes the student's text.
        StudentError: a rank died, or does not answer; or whatever a rank raised.
        Stopped: the run was asked to stop, and the students left or their grace was over.
    """
    reports: dict[Any, dict[str, Any]] = {}
    grace_s = job.config.cluster.grace_seconds
    deadline: float | None = None
    while len(reports) < len(students.running):
        pending = [call for call in students.running if call not in reports]
        ended, _ = ray.wait(pending, timeout=POLL_S)
        events = [*teacher.events(), *students.events(), *(rollouts.events() if rollouts is not None else [])]
        show(events, job.display)
        if any(event["kind"] == "checkpoint" for event in events):
            saved()
        for call in ended:
            reports[call] = students.result(call)
        if job.stop.is_set() and deadline is None:
            job.display.phase("stopping after the step in progress")
            students.ask_to_stop()
            deadline = time.monotonic() + grace_s
        if any(event["kind"] in ("leaving", "recorded") for event in events):
            teacher.release()
        if deadline is not None and time.monotonic() > deadline:
            raise Stopped(f"nothing was saved within cluster.grace_seconds = {grace_s:g}")
    show(students.last_events(), job.display)
    report = reports[students.running[0]]
    if report.get("stopped"):
        raise Stopped(f"saved at step {report['step']}")
    return report


def write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=1) + "\n")


def main(flow: str, config_file: str, argument: str, endpoints: str = "", *only: str) -> int:
    """The driver process; its parent is ``kdscale.supervise``. ``only``: see ``serve.join``. Returns the exit code."""
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
            case "join":
                join(job, Path(argument), only)
            case "record":
                record(job, Path(argument))
            case "generate":
                generate(job, Path(argument))
            case _:
                raise ValueError(f"flow {flow!r}: train, evaluate, serve, join, record or generate")
        return 0
    except Stopped as stopped:
        job.display.close()
        how_on = {
            "train": "; the same command goes on from the newest checkpoint",
            "record": "; the same command goes on",
            "generate": "; the same command goes on",
        }.get(flow, "")
        print(f"kdscale: stopped, {stopped}{how_on}", file=sys.stderr)
        return supervise.INTERRUPTED
    except KdscaleError as error:
        job.display.close()
        print(f"kdscale: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except Exception:  # noqa: BLE001 - whatever it is (a full disk, for instance), the process must end, see below
        job.display.close()
        traceback.print_exc()
        return 1
    finally:
        job.display.close()
        supervise.leave()


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # A Flight server waits for its clients before it goes, for those that are cut off too.
    os._exit(code)
