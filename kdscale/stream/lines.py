"""Which teacher endpoints a student uses, and the connections to them; follows the directory beside the requests."""

import threading
import time
from collections import deque
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.flight as fl
import xxhash

from kdscale import log
from kdscale.batch import Batch
from kdscale.config.teachers import ALONE
from kdscale.errors import KdscaleError, StreamError
from kdscale.stream.directory import DirectoryClient, Listing
from kdscale.stream.protocol import Access, Endpoint, Header, connect, encode_rows, schema_of_rows
from kdscale.stream.watchdog import Watchdog

_LOG = log.get(__name__)
_FOLLOW_S = 1.0
_MOST_IDLE = 64
"""Exchanges of a line that are kept: more than requests are in flight, few enough that those of other kinds go some time."""
_AVOID_S = 3.0
"""A replica that failed is not used for this long while there are others: by then the directory has heard of it."""


class Retry(Exception):
    """This attempt failed; another endpoint, or the same one later, may serve."""

    def __init__(self, reason: str, *, elsewhere: bool = False) -> None:
        """``elsewhere``: other endpoints are at hand, so there is nothing to wait for."""
        super().__init__(reason)
        self.elsewhere = elsewhere


class Rebuilding(Retry):
    """No endpoint is live, and the directory says that one will be."""


class Exchange:
    """An open ``DoExchange``, for requests of one kind, one after the other."""

    def __init__(self, client: fl.FlightClient, header: Header, token: str) -> None:
        self.kind = (header.spec, header.num_columns)
        self._writer, self.reader = client.do_exchange(fl.FlightDescriptor.for_command(header.opening(token)))
        self._begun = False

    def ask(self, header: Header, batch: Batch) -> None:
        """Send a request; its answer is the next that ``reader`` reads. Raises: pyarrow.flight.FlightError."""
        if not self._begun:
            # What opens it travels with the schema: the teacher reads it while the rows are put together.
            self._writer.begin(schema_of_rows(batch))
            self._begun = True
        self._writer.write_with_metadata(encode_rows(batch), header.asking())

    def close(self) -> None:
        # Cancelled first: a teacher that stands still would not let go of it.
        self.reader.cancel()
        try:
            self._writer.close()
        except (fl.FlightError, pa.ArrowException, OSError) as error:
            _LOG.debug("an exchange ends: %s", error)


@dataclass
class Line:
    endpoint: Endpoint
    client: fl.FlightClient
    outstanding: int = 0
    """Tokens asked for and not answered."""
    served: int = 0
    """Tokens asked for so far."""
    closed: bool = False
    idle: "deque[Exchange]" = field(default_factory=deque)
    """Exchanges that nobody uses now, the last one used last."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def take(self, header: Header) -> Exchange | None:
        """An open exchange for requests like this one, if there is any."""
        kind = (header.spec, header.num_columns)
        with self._lock:
            found = next((one for one in reversed(self.idle) if one.kind == kind), None)
            if found is not None:
                self.idle.remove(found)
        return found

    def give(self, exchange: Exchange) -> None:
        """Keep an exchange that was answered whole."""
        with self._lock:
            self.idle.append(exchange)
        self._keep(0 if self.closed else _MOST_IDLE)

    def close(self) -> None:
        """Requests in progress go on; their exchanges are closed when they are given back."""
        self.closed = True
        self._keep(0)

    def _keep(self, most: int) -> None:
        with self._lock:
            surplus = [self.idle.popleft() for _ in range(len(self.idle) - most)]
        for exchange in surplus:
            exchange.close()


class Lines:
    """The lines of one student. Safe to use from several threads."""

    def __init__(self, access: Access, who: str, most: int, watchdog: Watchdog, teacher: str = ALONE) -> None:
        """``most``: endpoints that ``who`` connects to; ``teacher``: whose they are."""
        self._access = access
        self._who = who
        self._most = most
        self._watchdog = watchdog
        self._directory = DirectoryClient(access, teacher)
        self._lock = threading.Lock()
        self._lines: dict[Endpoint, Line] = {}
        self._failed: dict[tuple[str, int], float] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="directory-follower")

    def acquire(self, tokens: int) -> Line:
        """The line with the least outstanding. Raises: Retry, Rebuilding when there is none."""
        if not self._lines:
            self._refresh(self.listing())
        with self._lock:
            if not self._lines:
                raise Retry("the teacher's endpoints failed again at once")
            # Ties go to the one that has served least, so that ranks share the work evenly.
            line = min(self._lines.values(), key=lambda one: (one.outstanding, one.served))
            line.outstanding += tokens
            line.served += tokens
            return line

    def release(self, line: Line, tokens: int) -> None:
        with self._lock:
            line.outstanding -= tokens

    def drop(self, failed: Endpoint) -> bool:
        """Forget an endpoint that failed, with the others of its generation, which lives and dies as one; whether any is
        left."""
        with self._lock:
            self._failed[failed.replica, failed.generation] = time.monotonic()
            lost = [
                other
                for other in self._lines
                if other.replica == failed.replica and other.generation <= failed.generation
            ]
            gone = [self._lines.pop(other) for other in lost]
            left = bool(self._lines)
        for line in gone:
            line.close()
        return left

    def listing(self) -> Listing:
        """What the directory knows now. Raises: Retry when it does not answer, or lists no endpoint."""
        try:
            listing = self._directory.listing()
        except StreamError as error:
            raise Retry(str(error)) from error
        if not listing.endpoints:
            if listing.rebuilding:
                raise Rebuilding(f"the teacher is being rebuilt ({', '.join(listing.rebuilding)})")
            raise Retry("the directory knows no live endpoint")
        return listing

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            lines, self._lines = self._lines, {}
        for line in lines.values():
            line.close()
            line.client.close()
        self._directory.close()

    def _refresh(self, listing: Listing) -> None:
        """Keep lines to the endpoints that are listed, and to no other: an older generation is gone."""
        with self._lock:
            if self._closed.is_set():
                return
            if self._thread.ident is None:
                self._thread.start()
            now = time.monotonic()
            self._failed = {key: since for key, since in self._failed.items() if now - since < _AVOID_S}
            fine = [one for one in listing.endpoints if (one.replica, one.generation) not in self._failed]
            before = self._lines
            # A new line starts where the others are, or it would be asked for everything until it has caught up.
            served = min((line.served for line in before.values()), default=0)
            self._lines = {
                endpoint: before.get(endpoint)
                or Line(endpoint, connect(endpoint.address, self._access.credentials), served=served)
                for endpoint in self._mine(fine or listing.endpoints)
            }
            gone = [line for endpoint, line in before.items() if endpoint not in self._lines]
        for line in gone:
            line.close()

    def _mine(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        """Rendezvous hashing: each student keeps a stable few, so connections don't grow as students x teachers."""

        def weight(endpoint: Endpoint) -> int:
            return xxhash.xxh3_64_intdigest(f"{self._who}|{endpoint.replica}|{endpoint.rank}".encode())

        return sorted(endpoints, key=weight)[: self._most]

    def _follow(self) -> None:
        """Take up replicas that have joined or serve again, and let go of those that are gone, whose node may not even close
        the connection."""
        while not self._closed.wait(_FOLLOW_S):
            try:
                listing = self._directory.listing()
                if listing.endpoints:
                    self._refresh(listing)
                self._watchdog.follow(listing)
            except (KdscaleError, pa.ArrowException, OSError) as error:
                # Whoever needs an endpoint and has none says so, and gives up in time.
                _LOG.debug("%s", error)
