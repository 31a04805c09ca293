"""Places on the cluster, and teacher and student started on them; each ends with the stack it was started on."""

import secrets
import signal
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ray.util.placement_group import PlacementGroup

from kdscale import supervise
from kdscale.cluster.placement import cluster, require_memory, reserve
from kdscale.cluster.security import Authority, needs_tls
from kdscale.config.schema import RunConfig, StreamSection
from kdscale.display import Display
from kdscale.engine.checkpoint import Checkpoint
from kdscale.engine.process import address_in
from kdscale.errors import StreamError, TeacherError
from kdscale.estimate import host_memory
from kdscale.prepare import Prepared
from kdscale.stream.directory import DirectoryServer, list_endpoints
from kdscale.stream.protocol import Access, require_same_meaning
from kdscale.student.service import StudentGroup, student_ask
from kdscale.student.worker import StudentSetup
from kdscale.teacher.guard import TeacherGuard
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


class OwnTeacher:
    """A replica of this run's own, behind a directory of its own."""

    def __init__(self, guard: TeacherGuard, access: Access) -> None:
        self._guard = guard
        self._access = access

    def open(self) -> Access:
        """Wait until it serves. Raises: TeacherError."""
        self._guard.open()
        return self._access

    def events(self) -> list[dict[str, Any]]:
        """What happened to it since the last call. Raises: TeacherError when it is lost for good."""
        return self._guard.events()

    def release(self) -> None:
        """No target is needed any more: leave the processors to the students."""
        self._guard.stop(at_once=True)


class ServedTeacher:
    """A teacher somebody else serves; its death shows in the stream, not here."""

    def __init__(self, access_file: Path, stream: StreamSection, prepared: Prepared) -> None:
        self._access_file = access_file
        self._stream = stream
        self._meaning = prepared.meaning

    def open(self) -> Access:
        """Ask its directory. Raises: TeacherError, IdentityError, StreamError."""
        access = Access.load(self._access_file)
        if needs_tls(self._stream) and access.credentials is None:
            raise StreamError(
                f"{self._access_file} holds no certificates: that teacher listens plainly, but stream.tls ="
                f" {self._stream.tls} with stream.network = {self._stream.network} asks for TLS; serve the teacher with"
                " the same stream section"
            )
        listing = list_endpoints(access)
        if listing.meaning is None or not (listing.endpoints or listing.rebuilding):
            raise TeacherError(f"the directory at {access.directory} ({self._access_file}) knows no live endpoint")
        require_same_meaning(self._meaning, listing.meaning)
        return access

    def release(self) -> None:
        """Somebody else's to end."""

    def events(self) -> list[dict[str, Any]]:
        return []


@dataclass(frozen=True)
class Slots:
    teacher: PlacementGroup | None
    student: PlacementGroup | None


def place(job: Job, stack: ExitStack, *, student: bool = True) -> Slots:
    """Join or start the cluster and reserve places on it. Raises: PlacementError."""
    if job.config.cluster.address is None and not job.config.student.gpus_per_rank:
        needed = host_memory(job.config)
        if needed is not None:
            require_memory(needed, "this run (weights, gradients and optimizer of teacher and student)")
    job.display.phase("starting Ray" if job.config.cluster.address is None else "joining the Ray cluster")
    asks = {}
    if job.teacher_endpoints is None:
        asks["teacher"] = teacher_ask(job.config.teacher)
    if student:
        asks["student"] = student_ask(job.config.student)
    stack.enter_context(cluster(job.config.cluster, list(asks.values()), supervise.temp_dir()))
    _stop_on_signals(job.stop)
    wait_s = job.config.cluster.wait_seconds
    groups = {name: stack.enter_context(reserve(ask, wait_s)) for name, ask in asks.items()}
    return Slots(groups.get("teacher"), groups.get("student"))


def _stop_on_signals(stop: threading.Event) -> None:
    """SIGTERM and SIGINT set ``stop`` from here on; Ray has installed a handler of its own when it started."""

    def ask(signum: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)


def start_teacher(job: Job, prepared: Prepared, slots: Slots, stack: ExitStack) -> OwnTeacher | ServedTeacher:
    """Let the teacher load, without waiting for the end of it."""
    config = job.config
    if job.teacher_endpoints is not None:
        return ServedTeacher(job.teacher_endpoints, config.stream, prepared)
    assert slots.teacher is not None
    job.display.phase("loading the teacher")
    token = secrets.token_hex(32)
    credentials = Authority().issue() if needs_tls(config.stream) else None
    host, _ = address_in(config.stream.network)
    endpoints = DirectoryServer(host, config.stream.directory_port, token, credentials)
    setup = ReplicaSetup(
        teacher=config.teacher,
        directory=str(prepared.teacher_directory.absolute()),
        meaning=prepared.meaning,
        network=config.stream.network,
        token=token,
        credentials=credentials,
        deterministic=config.run.deterministic,
    )
    guard = TeacherGuard(setup, slots.teacher, endpoints)
    stack.callback(guard.stop)
    guard.begin()
    return OwnTeacher(guard, Access(endpoints.address, token, credentials))


def start_students(
    job: Job,
    prepared: Prepared,
    identity: dict[str, Any],
    checkpoint: Checkpoint | None,
    slots: Slots,
    stack: ExitStack,
) -> StudentGroup:
    """Let the student ranks build, without waiting for the end of it."""
    assert slots.student is not None
    job.display.phase("building the student")
    setup = StudentSetup(
        config=job.config,
        meaning=prepared.meaning,
        identity=identity,
        teacher_directory=str(prepared.teacher_directory.absolute()),
        run_directory=str(job.directory.absolute()),
        resume_from=str(checkpoint.directory.absolute()) if checkpoint else None,
    )
    students = StudentGroup(setup, slots.student)
    stack.callback(students.kill)
    students.begin()
    return students
