"""The run's one fixed address: a small service that holds the live teacher endpoints with their generations."""

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.flight as fl

from kdscale.credentials import Credentials
from kdscale.errors import PlacementError, StreamError
from kdscale.stream.protocol import Access, Endpoint, Meaning, call, connect, listening, open_message

_CALL_SECONDS = 10.0


@dataclass(frozen=True)
class Listing:
    """What the directory knows."""

    endpoints: list[Endpoint]
    meaning: Meaning | None
    """None: no teacher has served yet."""
    rebuilding: list[str]
    """Replicas that are lost and will be published again."""


class DirectoryServer(fl.FlightServerBase):
    """Serves the endpoint list; only the process that made it changes the list."""

    def __init__(self, host: str, port: int, token: str, credentials: Credentials | None = None) -> None:
        """Plain without ``credentials``. Raises: PlacementError when that would be off loopback, or the port is taken."""
        try:
            super().__init__(**listening(host, port, credentials))
        except (OSError, pa.ArrowException) as error:
            raise PlacementError(
                f"the endpoint directory cannot listen on {host}:{port}: {error}; free the port or set"
                " stream.directory_port (0 picks a free one)"
            ) from error
        self.address = f"{host}:{self.port}"
        self._token = token
        self._lock = threading.Lock()
        self._endpoints: dict[str, list[Endpoint]] = {}
        self._meaning: Meaning | None = None
        self._rebuilding: set[str] = set()

    def publish(self, replica: str, endpoints: list[Endpoint], meaning: Meaning) -> None:
        """Make a replica's endpoints known, in place of those of its earlier generation."""
        with self._lock:
            self._endpoints[replica] = endpoints
            self._meaning = meaning
            self._rebuilding.discard(replica)

    def withdraw(self, replica: str, *, rebuilding: bool) -> None:
        """A replica is lost; with ``rebuilding``, clients are told that it comes back, and wait without giving up."""
        with self._lock:
            self._endpoints.pop(replica, None)
            (self._rebuilding.add if rebuilding else self._rebuilding.discard)(replica)

    def do_action(self, context: fl.ServerCallContext, action: fl.Action) -> Iterator[fl.Result]:
        try:
            open_message(action.body.to_pybytes(), self._token)
        except StreamError as error:
            raise fl.FlightUnauthenticatedError(str(error)) from error
        if action.type != "endpoints":
            raise fl.FlightServerError(f"unknown action {action.type!r}; this is the directory, it knows 'endpoints'")
        with self._lock:
            endpoints = [asdict(endpoint) for replica in self._endpoints.values() for endpoint in replica]
            meaning = asdict(self._meaning) if self._meaning else None
            rebuilding = sorted(self._rebuilding)
        yield fl.Result(json.dumps({"endpoints": endpoints, "meaning": meaning, "rebuilding": rebuilding}).encode())


def list_endpoints(access: Access) -> Listing:
    """Ask the directory. Raises: StreamError when it does not answer, or one of both sides refuses the other."""
    try:
        with connect(access.directory, access.credentials) as client:
            answer = call(client, "endpoints", access.token, _CALL_SECONDS)
    except fl.FlightError as error:
        # Who is refused in a TLS handshake sees a closed socket or an unknown issuer, and can't tell which it was.
        raise StreamError(
            f"the endpoint directory at {access.directory} does not answer"
            f" {'over TLS' if access.credentials else 'a plain connection'}; if it runs, the token or the certificates"
            f" are another run's or too old: take the access file of the teacher that serves now: {error}"
        ) from error
    meaning = Meaning(**answer["meaning"]) if answer["meaning"] else None
    return Listing([Endpoint(**fields) for fields in answer["endpoints"]], meaning, answer["rebuilding"])
