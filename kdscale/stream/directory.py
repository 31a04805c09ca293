"""The run's one fixed address: a small service that holds the live teacher endpoints with their generations."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import pyarrow as pa
import pyarrow.flight as fl

from kdscale.config.teachers import ALONE
from kdscale.credentials import Credentials
from kdscale.errors import IdentityError, PlacementError, StreamError
from kdscale.stream.protocol import (
    Access,
    Endpoint,
    Meaning,
    call,
    connect,
    listening,
    open_message,
    require_same_meaning,
)

_CALL_SECONDS = 10.0
LEASE_S = 4.0
"""A replica that has joined and does not renew within this time is forgotten."""

State = Literal["serving", "rebuilding", "leaving"]


@dataclass(frozen=True)
class Listing:
    """What the directory knows of one teacher."""

    endpoints: list[Endpoint]
    """Of the replicas that take requests."""
    meaning: Meaning
    """Of every replica of this teacher."""
    rebuilding: list[str]
    """Replicas that are lost and will be published again."""
    leaving: list[str]
    """Replicas that finish what they have been asked and take nothing more."""


class Registry(Protocol):
    """Where a replica makes itself known: the directory of its own process, or one elsewhere (``joining.py``)."""

    @property
    def has_hope(self) -> bool:
        """Whether a replica serves, or is being rebuilt."""
        ...

    def publish(self, replica: str, endpoints: list[Endpoint]) -> None:
        """Make a replica's endpoints known, in place of those of its earlier generation."""
        ...

    def withdraw(self, replica: str, *, rebuilding: bool) -> None:
        """A replica is lost; with ``rebuilding``, clients are told that it comes back, and wait without giving up."""
        ...


@dataclass(frozen=True)
class _Entry:
    teacher: str
    state: State
    endpoints: list[Endpoint] = field(default_factory=list)
    lease_ends: float = float("inf")
    """Of this process's monotonic clock; the replicas of the run's own need no lease."""


class DirectoryServer(fl.FlightServerBase):
    """Serves the list of every teacher's replicas; ``of`` keeps that of one. Replicas of other processes join by action
    ``register``, and renew it in time."""

    def __init__(
        self,
        host: str,
        port: int,
        token: str,
        meanings: dict[str, Meaning],
        credentials: Credentials | None = None,
    ) -> None:
        """``meanings``: by teacher. Plain without ``credentials``.

        Raises: PlacementError when that would be off loopback, or the port is taken.
        """
        try:
            super().__init__(**listening(host, port, credentials))
        except (OSError, pa.ArrowException) as error:
            raise PlacementError(
                f"the endpoint directory cannot listen on {host}:{port}: {error}; free the port or set"
                " stream.directory_port (0 picks a free one)"
            ) from error
        self.address = f"{host}:{self.port}"
        self._token = token
        self._meanings = meanings
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}

    def of(self, teacher: str) -> "Shelf":
        """What this directory keeps of one teacher."""
        return Shelf(self, teacher)

    def put(self, replica: str, entry: _Entry | None) -> None:
        """Make known what became of a replica; none: forget it."""
        with self._lock:
            if entry is None:
                self._entries.pop(replica, None)
            else:
                self._entries[replica] = entry

    def live(self, teacher: str) -> dict[str, _Entry]:
        """The teacher's replicas by name."""
        with self._lock:
            now = time.monotonic()
            self._entries = {name: entry for name, entry in self._entries.items() if now < entry.lease_ends}
            return {name: entry for name, entry in self._entries.items() if entry.teacher == teacher}

    # ---- what others ask ----

    def do_action(self, context: fl.ServerCallContext, action: fl.Action) -> Iterator[fl.Result]:
        try:
            fields = open_message(action.body.to_pybytes(), self._token)
        except StreamError as error:
            raise fl.FlightUnauthenticatedError(str(error)) from error
        try:
            match action.type:
                case "endpoints":
                    answer = self._listing(fields)
                case "register":
                    answer = self._register(fields)
                case "leave":
                    answer = self._leave(fields)
                case other:
                    raise fl.FlightServerError(
                        f"unknown action {other!r}; the directory knows 'endpoints', 'register' and 'leave'"
                    )
        except (KeyError, TypeError, ValueError) as error:
            raise fl.FlightServerError(f"malformed {action.type!r}: {error!r}") from error
        except IdentityError as error:
            raise fl.FlightServerError(str(error), extra_info=b"IdentityError") from error
        yield fl.Result(json.dumps(answer).encode())

    def _meaning(self, teacher: str) -> Meaning:
        """Raises: IdentityError."""
        if teacher not in self._meanings:
            raise IdentityError(
                f"no teacher is called {teacher!r} here; there are {', '.join(self._meanings)}: name the teachers as the config"
                " of who serves them does (teachers.main, teachers.others)"
            )
        return self._meanings[teacher]

    def _listing(self, fields: dict[str, Any]) -> dict[str, Any]:
        meaning = self._meaning(teacher := str(fields["teacher"]))
        live = self.live(teacher)
        return {
            "endpoints": [
                asdict(endpoint) for one in live.values() if one.state == "serving" for endpoint in one.endpoints
            ],
            "meaning": asdict(meaning),
            "rebuilding": sorted(name for name, one in live.items() if one.state == "rebuilding"),
            "leaving": sorted(name for name, one in live.items() if one.state == "leaving"),
        }

    def _register(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A replica elsewhere says what it is, and that it lives. Raises: IdentityError, ValueError."""
        replica, teacher, state = str(fields["replica"]), str(fields["teacher"]), fields["state"]
        require_same_meaning(self._meaning(teacher), Meaning(**fields["meaning"]))
        endpoints = [Endpoint(**one) for one in fields["endpoints"]]
        if state not in ("serving", "rebuilding", "leaving") or any(one.replica != replica for one in endpoints):
            raise ValueError(f"{state!r} of {replica!r} with {endpoints}")
        with self._lock:
            if replica in self._entries and self._entries[replica].lease_ends == float("inf"):
                raise ValueError(f"{replica!r} is the name of one of the run's own")
            self._entries[replica] = _Entry(teacher, state, endpoints, time.monotonic() + LEASE_S)
        return {"lease_seconds": LEASE_S}

    def _leave(self, fields: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            entry = self._entries.get(str(fields["replica"]))
            if entry is not None and entry.lease_ends < float("inf"):
                del self._entries[str(fields["replica"])]
        return {}


class Shelf:
    """A ``Registry`` of one teacher's replicas in this process."""

    def __init__(self, directory: DirectoryServer, teacher: str) -> None:
        self._directory, self._teacher = directory, teacher

    @property
    def has_hope(self) -> bool:
        return any(entry.state != "leaving" for entry in self._directory.live(self._teacher).values())

    def publish(self, replica: str, endpoints: list[Endpoint]) -> None:
        self._directory.put(replica, _Entry(self._teacher, "serving", endpoints))

    def withdraw(self, replica: str, *, rebuilding: bool) -> None:
        self._directory.put(replica, _Entry(self._teacher, "rebuilding") if rebuilding else None)


class DirectoryClient:
    """A connection to a run's directory, about one of its teachers. Safe to call from several threads."""

    def __init__(self, access: Access, teacher: str = ALONE) -> None:
        self._access = access
        self._teacher = teacher
        self._client: fl.FlightClient | None = None

    def ask(self, action: str, timeout_s: float = _CALL_SECONDS, **fields: Any) -> dict[str, Any]:
        """One action.

        Raises:
            StreamError: the directory does not answer, or one of both sides refuses the other.
            IdentityError: a teacher that joins means something else than the run's own, or the run has none of the name.
        """
        client = self._client or connect(self._access.directory, self._access.credentials)
        self._client = client
        try:
            return call(client, action, self._access.token, timeout_s, teacher=self._teacher, **fields)
        except fl.FlightError as error:
            # A connection that failed tries again ever more seldom; a new one tries at once.
            self._client = None
            if getattr(error, "extra_info", b"") == b"IdentityError":
                raise IdentityError(str(error).split(". ", 1)[0]) from error
            # Who is refused in a TLS handshake sees a closed socket or an unknown issuer, and can't tell which it was.
            raise StreamError(
                f"the endpoint directory at {self._access.directory} does not answer"
                f" {'over TLS' if self._access.credentials else 'a plain connection'}; if it runs, the token or the"
                " certificates are another run's or too old: take the access file of the teacher that serves now:"
                f" {error}"
            ) from error

    def listing(self) -> Listing:
        """Raises: StreamError, IdentityError."""
        answer = self.ask("endpoints")
        return Listing(
            endpoints=[Endpoint(**fields) for fields in answer["endpoints"]],
            meaning=Meaning(**answer["meaning"]),
            rebuilding=answer["rebuilding"],
            leaving=answer["leaving"],
        )

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def list_endpoints(access: Access, teacher: str = ALONE) -> Listing:
    """Ask the directory once about ``teacher``.

    Raises:
        StreamError: it does not answer, or one of both sides refuses the other.
        IdentityError: it knows no such teacher.
    """
    client = DirectoryClient(access, teacher)
    try:
        return client.listing()
    finally:
        client.close()
