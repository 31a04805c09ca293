"""Flows without a student: a teacher that is served to runs elsewhere, joins one, or is recorded."""

import secrets
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from kdscale.config.teachers import require_one_teacher
from kdscale.prepare import corpus_of, prepare
from kdscale.record import Recorder
from kdscale.start import Job, OwnTeacher, Stopped, load_access, place, start_replicas, start_teacher
from kdscale.stream.joining import RemoteRegistry
from kdscale.supervise import filling
from kdscale.waits import POLL_S, ready, show

_LEAVING_S = 2.5
_TEARDOWN_S = 3.0


def serve(job: Job, endpoints_file: Path) -> None:
    """Serve the teacher for runs elsewhere until asked to stop. Raises: KdscaleError, Stopped."""
    prepared = prepare(job.config)
    with ExitStack() as stack:
        teacher = start_teacher(job, prepared, place(job, stack, student=False), stack)
        ready(job, teacher, None)
        assert isinstance(teacher, OwnTeacher)
        teacher.invite(endpoints_file, stack)
        job.display.phase(f"serving; runs elsewhere use --teacher-endpoints {endpoints_file} (Ctrl-C ends)")
        while not job.stop.wait(POLL_S):
            show(teacher.events(), job.display)
    raise Stopped("the teacher was asked to")


def join(job: Job, access_file: Path, only: Sequence[str]) -> None:
    """Serve replicas of the teacher to the run that ``access_file`` opens, until it ends or we are asked to leave; of several
    teachers those of ``only`` these, or of all when that is empty.

    Raises: KdscaleError, Stopped.
    """
    access = load_access(access_file, job.config.stream)
    prepared = prepare(job.config)
    with ExitStack() as stack:
        # Before anything is started: whether the run is there, and wants a teacher of this meaning.
        joining = {name: known for name, known in prepared.teachers.items() if not only or name in only}
        registries = {name: RemoteRegistry(access, known.meaning, name) for name, known in joining.items()}
        for registry in registries.values():
            stack.callback(registry.close)
        slots = place(job, stack, student=False, only=joining)
        prefix = f"joined-{secrets.token_hex(4)}-"
        teacher = start_replicas(job, prepared, slots, registries, access, prefix, stack)
        ready(job, teacher, None)
        job.display.phase(f"serving the run whose directory is {access.directory} (Ctrl-C leaves it)")
        while not job.stop.wait(POLL_S):
            show(teacher.events(), job.display)
            faults = [registry.fault for registry in registries.values() if registry.fault is not None]
            if faults and access_file.exists():
                raise faults[0]
            if not access_file.exists():
                job.display.phase("the run has ended")
                return
        leave(job, teacher, [*registries.values()])
    raise Stopped("the teacher has left the run")


def leave(job: Job, teacher: OwnTeacher, registries: list[RemoteRegistry]) -> None:
    """Take no further request, and finish those in hand within the grace."""
    job.display.phase("leaving the run after the requests in hand")
    for registry in registries:
        registry.leave()
    # A student may use what it knew of the directory until it asks again, and a heartbeat is as old as its period.
    until = time.monotonic() + _LEAVING_S
    deadline = time.monotonic() + job.config.cluster.grace_seconds - _TEARDOWN_S
    while time.monotonic() < until or (not teacher.idle() and time.monotonic() < deadline):
        show(teacher.events(), job.display)
        time.sleep(POLL_S)


def record(job: Job, directory: Path) -> None:
    """Score the training text once and leave the targets in ``directory``. Raises: KdscaleError, Stopped."""
    require_one_teacher(job.config, "kdscale record")
    prepared = prepare(job.config)
    with ExitStack() as stack:
        stack.enter_context(filling(directory))
        teacher = start_teacher(job, prepared, place(job, stack, student=False), stack)
        corpus = corpus_of(job.config, prepared, job.display.count)
        recorder = Recorder(job.config, prepared.meaning, corpus, directory)
        ready(job, teacher, None)

        def tick(done: int, total: int) -> None:
            show(teacher.events(), job.display)
            job.display.count(done, total, "recording row")

        assert teacher.access is not None
        if not recorder.run(teacher.access, tick, job.stop):
            raise Stopped(f"finished shards stay in {directory}")
    job.display.close()
    print(directory)
