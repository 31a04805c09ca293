"""Places on the cluster, and teacher and student started on them; each ends with the stack it was started on."""

import os
import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from ray.util.placement_group import PlacementGroup

from kdscale import supervise
from kdscale.cluster.placement import Ask, cluster, require_memory, reserve
from kdscale.cluster.security import Authority, needs_tls
from kdscale.config.schema import RunConfig
from kdscale.config.sections import StreamSection
from kdscale.credentials import ACCESS_FILE, Credentials, Keys
from kdscale.display import Display
from kdscale.engine.checkpoint import Checkpoint
from kdscale.errors import PlacementError, StreamError, TeacherError
from kdscale.estimate import host_memory
from kdscale.node import address_in
from kdscale.on_policy.service import RolloutGuard, rollout_ask
from kdscale.on_policy.worker import RolloutSetup
from kdscale.prepare import Prepared
from kdscale.stream.directory import DirectoryServer, Registry, list_endpoints
from kdscale.stream.protocol import Access, require_same_meaning
from kdscale.stream.whole import needs_no_teacher
from kdscale.student.service import StudentGroup, student_ask
from kdscale.student.worker import StudentSetup
from kdscale.teacher.guard import ReplicaGuard
from kdscale.teacher.replica import ReplicaSetup
from kdscale.teacher.service import teacher_ask


class Stopped(Exception):
    """The run was asked to stop; a later one goes on from its newest checkpoint."""


@dataclass(frozen=True)
class Job:
    """What the driver carries through a flow."""

    config: RunConfig
    stop: threading.Event
    """Set by SIGTERM and SIGINT."""
    display: Display
    teacher_endpoints: Path | None
    """Access file of a teacher that ``kdscale teacher`` serves; none starts one of our own."""

    @property
    def directory(self) -> Path:
        return Path(self.config.run.dir) / self.config.run.name


@dataclass(frozen=True)
class Replicas:
    """Those of one teacher that this process keeps, and where they are known."""

    guards: list[ReplicaGuard]
    registry: Registry

    def require_hope(self) -> None:
        """Raises: the fault of a replica, usually a TeacherError, when all are lost for good and none has joined."""
        faults = [guard.fault for guard in self.guards if guard.fault is not None]
        if len(faults) == len(self.guards) and not self.registry.has_hope:
            raise faults[0]


class OwnTeacher:
    """The replicas this process keeps, of one teacher or of several, known to a directory of its own or to that of the run they
    have joined."""

    def __init__(self, teachers: list[Replicas], access: Access) -> None:
        self._teachers = teachers
        self._guards = [guard for one in teachers for guard in one.guards]
        self.access = access

    @property
    def serves(self) -> bool:
        """Whether a replica of every teacher has served yet."""
        return all(any(guard.served for guard in one.guards) for one in self._teachers)

    def events(self) -> list[dict[str, Any]]:
        """What happened since the last call.

        Raises: see ``Replicas.require_hope``, for any teacher.
        """
        happened = [{"kind": "phase", "phase": phase} for guard in self._guards for phase in guard.phases()]
        for one in self._teachers:
            one.require_hope()
        return happened

    def invite(self, path: Path, stack: ExitStack) -> None:
        """While the stack lasts, an access file at ``path`` lets others use the teacher, or join it."""
        self.access.save(path)
        stack.callback(path.unlink, missing_ok=True)

    def idle(self) -> bool:
        """Whether no replica has a request in hand, as of its last heartbeat."""
        return all(guard.in_flight == 0 for guard in self._guards)

    def release(self) -> None:
        """No target is needed any more: leave the processors to the students."""
        for guard in self._guards:
            guard.stop(at_once=True)


class ServedTeacher:
    """A teacher somebody else serves; its death shows in the stream, not here."""

    def __init__(self, access_file: Path, stream: StreamSection, prepared: Prepared) -> None:
        """Ask its directory. Raises: TeacherError, IdentityError, StreamError."""
        self.serves = True
        self.access = load_access(access_file, stream)
        for name, known in prepared.teachers.items():
            listing = list_endpoints(self.access, name)
            if not (listing.endpoints or listing.rebuilding):
                raise TeacherError(
                    f"the directory at {self.access.directory} ({access_file}) knows no live endpoint of {name!r}"
                )
            require_same_meaning(known.meaning, listing.meaning)

    def invite(self, path: Path, stack: ExitStack) -> None:
        """Who wants to join a teacher asks those who serve it."""

    def release(self) -> None:
        """Somebody else's to end."""

    def events(self) -> list[dict[str, Any]]:
        return []


class NoTeacher:
    """Nobody serves: the targets were recorded, and the students read them, or there are none."""

    serves = True
    access = None

    def invite(self, path: Path, stack: ExitStack) -> None:
        """Nobody can join what is not there."""

    def release(self) -> None:
        """Nothing to end."""

    def events(self) -> list[dict[str, Any]]:
        return []


Teacher = OwnTeacher | ServedTeacher | NoTeacher


def load_access(access_file: Path, stream: StreamSection) -> Access:
    """What opens a teacher that is served elsewhere. Raises: StreamError."""
    access = Access.load(access_file)
    if needs_tls(stream) and access.credentials is None:
        raise StreamError(
            f"{access_file} holds no certificates: that teacher listens plainly, but stream.tls = {stream.tls} with"
            f" stream.network = {stream.network} asks for TLS; serve the teacher with the same stream section"
        )
    return access


@dataclass(frozen=True)
class Slots:
    teachers: dict[str, list[PlacementGroup]]
    """By teacher, one a replica; none where somebody else serves the teachers, or nobody does."""
    student: PlacementGroup | None
    rollouts: PlacementGroup | None = None
    """None where the student learns on no text of its own."""


def end_at_once(job: Job, fault: PlacementError) -> None:
    """End this process for ``fault``, and what belongs to the run: without its cluster nothing can be taken down in order."""
    try:
        (job.directory / ACCESS_FILE).unlink(missing_ok=True)
        job.display.close()
        print(f"kdscale: {type(fault).__name__}: {fault}", file=sys.stderr, flush=True)
    finally:
        # Whoever reads the output may be gone, too.
        try:
            supervise.leave()
        finally:
            os._exit(fault.exit_code)


def place(
    job: Job, stack: ExitStack, *, student: bool = True, rollouts: bool = False, only: Container[str] | None = None
) -> Slots:
    """Join or start the cluster and reserve places on it; with ``rollouts`` also for who writes the student's text, where the
    config has them, and of its teachers for ``only`` these. Raises: PlacementError."""
    config = job.config
    elsewhere = job.teacher_endpoints is not None or needs_no_teacher(config.targets)
    served = {} if elsewhere else config.named_teachers
    served = {name: one for name, one in served.items() if only is None or name in only}
    if config.cluster.address is None:
        needed = host_memory(config, served.values(), student=student, rollouts=rollouts)
        if needed is not None:
            require_memory(needed, "what starts here (weights, and of a student gradients and optimizer)")
    job.display.phase("starting Ray" if config.cluster.address is None else "joining the Ray cluster")
    teachers = {name: [teacher_ask(teacher)] * teacher.replicas for name, teacher in served.items()}
    students = [student_ask(config.student)] if student else []
    writers = [rollout_ask(config.on_policy)] if rollouts and config.on_policy is not None else []
    every = [*(ask for asked in teachers.values() for ask in asked), *students, *writers]
    stack.enter_context(cluster(config.cluster, every, supervise.temp_dir(), partial(end_at_once, job)))
    stop_on_signals(job.stop)

    def reserved(asks: list[Ask]) -> list[PlacementGroup]:
        return [stack.enter_context(reserve(ask, config.cluster.wait_seconds)) for ask in asks]

    groups = {name: reserved(asked) for name, asked in teachers.items()}
    return Slots(groups, next(iter(reserved(students)), None), next(iter(reserved(writers)), None))


def stop_on_signals(stop: threading.Event) -> None:
    """SIGTERM and SIGINT set ``stop`` from here on. Ray installs a handler of its own when it starts: call this after."""

    def ask(signum: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)


def start_teacher(job: Job, prepared: Prepared, slots: Slots, stack: ExitStack) -> Teacher:
    """Let all replicas load, without waiting for the end of it."""
    config = job.config
    if needs_no_teacher(config.targets):
        return NoTeacher()
    if job.teacher_endpoints is not None:
        return ServedTeacher(job.teacher_endpoints, config.stream, prepared)
    token = secrets.token_hex(32)
    credentials = Authority().issue() if needs_tls(config.stream) else None
    host, _ = address_in(config.stream.network)
    meanings = {name: known.meaning for name, known in prepared.teachers.items()}
    directory = DirectoryServer(host, config.stream.directory_port, token, meanings, credentials)
    access = Access(directory.address, token, credentials)
    registries: dict[str, Registry] = {name: directory.of(name) for name in meanings}
    return start_replicas(job, prepared, slots, registries, access, "", stack)


def replica_setup(
    config: RunConfig, prepared: Prepared, teacher: str, token: str, credentials: Credentials | None
) -> ReplicaSetup:
    """What the ranks of the config's teacher of the name are told."""
    return ReplicaSetup(
        teacher=config.named_teachers[teacher],
        directory=prepared.teachers[teacher].directory,
        meaning=prepared.teachers[teacher].meaning,
        network=config.stream.network,
        token=token,
        credentials=credentials,
        deterministic=config.run.deterministic,
    )


def start_replicas(
    job: Job,
    prepared: Prepared,
    slots: Slots,
    registries: Mapping[str, Registry],
    access: Access,
    prefix: str,
    stack: ExitStack,
) -> OwnTeacher:
    """Let the replicas of all teachers load, to be known to their registries, which ``access`` opens. They are called
    ``replica-0``, ``replica-1``, ..., those of several teachers after their teacher, all behind ``prefix``."""
    several = len(prepared.teachers) > 1
    which = f"teacher{'s' * (len(slots.teachers) > 1)} {', '.join(slots.teachers)}"
    job.display.phase(f"loading the {which}" if several else "loading the teacher")
    teachers = []
    for name, groups in slots.teachers.items():
        setup = replica_setup(job.config, prepared, name, access.token, access.credentials)
        called = f"{prefix}{name if several else 'replica'}"
        guards = [ReplicaGuard(setup, group, registries[name], f"{called}-{n}") for n, group in enumerate(groups)]
        teachers.append(Replicas(guards, registries[name]))
        for guard in guards:
            stack.callback(guard.stop)
            guard.start()
    return OwnTeacher(teachers, access)


def start_rollouts(
    job: Job, prepared: Prepared, corpus: str, checkpoint: Checkpoint | None, slots: Slots, stack: ExitStack
) -> tuple[RolloutGuard, Path] | None:
    """Let the ranks that write the student's text build, without waiting for them, and where they write for a life of it that
    goes on from ``checkpoint``; none without on_policy."""
    if slots.rollouts is None:
        return None
    exchanges = job.directory.absolute() / "on-policy"
    shutil.rmtree(exchanges, ignore_errors=True)
    stack.callback(shutil.rmtree, exchanges, ignore_errors=True)
    # One for each life: a rank of an earlier one may be on its way to write.
    exchange = exchanges / secrets.token_hex(4)
    setup = RolloutSetup(
        config=job.config,
        meaning=prepared.meaning,
        corpus=corpus,
        teacher_directory=str(prepared.teacher_directory.absolute()),
        exchange=str(exchange),
        start=checkpoint.step if checkpoint else 0,
    )
    guard = RolloutGuard(setup, slots.rollouts)
    stack.callback(guard.stop)
    guard.start()
    return guard, exchange


def start_students(
    job: Job,
    prepared: Prepared,
    identity: dict[str, Any],
    checkpoint: Checkpoint | None,
    slots: Slots,
    stack: ExitStack,
    meanwhile: Callable[[], None],
    exchange: Path | None = None,
) -> StudentGroup:
    """Let the student ranks build, without waiting for the end of it; what ``meanwhile`` raises ends the wait for their
    processes. ``exchange``: see ``StudentSetup``."""
    assert slots.student is not None
    job.display.phase("building the student")
    setup = StudentSetup(
        config=job.config,
        teachers=prepared.teachers,
        identity=identity,
        run_directory=str(job.directory.absolute()),
        resume_from=str(checkpoint.directory.absolute()) if checkpoint else None,
        exchange=str(exchange) if exchange is not None else None,
    )
    # Of this group alone: its teacher may be served with others, or recorded.
    keys = Keys(Authority().issue(), secrets.token_hex(32)) if needs_tls(job.config.stream) else None
    students = StudentGroup(setup, slots.student, keys)
    stack.callback(students.kill)
    students.begin(meanwhile)
    return students
