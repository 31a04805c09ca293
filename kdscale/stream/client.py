"""Pulls soft targets from whichever teacher rank is free, verifies every byte, and retries elsewhere."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.flight as fl
import tenacity
import xxhash

from kdscale import log
from kdscale.batch import SoftTargets, TokenBatch
from kdscale.config.schema import StreamSection
from kdscale.errors import IdentityError, PayloadError, StreamError
from kdscale.head import Head
from kdscale.spec import TargetSpec
from kdscale.stream.directory import list_endpoints
from kdscale.stream.protocol import Access, Endpoint, Header, Meaning, call, connect, encode_rows, message
from kdscale.stream.server import decode_head
from kdscale.stream.watchdog import Watch, Watchdog
from kdscale.targets import arrow
from kdscale.targets.decode import decode
from kdscale.targets.layout import schema as target_schema

_LOG = log.get(__name__)
Answer = TypeVar("Answer")
_SAY_S = 5.0
_FATAL = {"IdentityError": IdentityError, "PayloadError": PayloadError}


_WAIT = tenacity.wait_random_exponential(multiplier=0.2, max=5.0)
_WAIT_REBUILDING = tenacity.wait_random(0.3, 0.7)


class _Retry(Exception):
    """This attempt failed; another endpoint, or the same one later, may serve."""


class _Rebuilding(_Retry):
    """No endpoint is live, and the directory says that one will be."""


@dataclass
class _Line:
    endpoint: Endpoint
    client: fl.FlightClient
    outstanding: int = 0
    served: int = 0


@dataclass
class Received:
    """Bytes and positions that answers held."""

    bytes: int = 0
    tokens: int = 0

    def add(self, parts: list[pa.RecordBatch]) -> None:
        self.bytes += sum(part.nbytes for part in parts)
        self.tokens += sum(part.num_rows for part in parts)


class FlightSource:
    """A ``TargetSource`` over the live teacher endpoints of a run. Safe to call from several threads."""

    def __init__(self, access: Access, meaning: Meaning, settings: StreamSection, who: str) -> None:
        self._access = access
        self._meaning = meaning
        self._settings = settings
        self._who = who
        self._lock = threading.Lock()
        self._lines: dict[Endpoint, _Line] = {}
        self._sequence = 0
        self._said = float("-inf")
        self._watchdog = Watchdog(settings.stall_seconds)
        self.received: dict[str, Received] = {}
        """What answers amounted to, by payload."""

    # ---- the contract ----

    def fetch(self, batch: TokenBatch, spec: TargetSpec) -> SoftTargets:
        def receive(line: _Line, header: Header) -> SoftTargets:
            parts = self._exchange(line, header, batch)
            try:
                targets = SoftTargets.join([decode(part, spec, self._meaning.vocab_size) for part in parts])
            except PayloadError as error:
                raise _Retry(f"{line.endpoint.address}: {error}") from error
            self.received.setdefault(spec.payload, Received()).add(parts)
            return targets

        return self._request(batch, spec, receive)

    def fetch_batches(self, batch: TokenBatch, spec: TargetSpec) -> list[pa.RecordBatch]:
        """The verified record batches of an answer, as they travelled."""
        return self._request(batch, spec, lambda line, header: self._exchange(line, header, batch))

    def _request(self, batch: TokenBatch, spec: TargetSpec, receive: Callable[[_Line, Header], Answer]) -> Answer:
        with self._lock:
            self._sequence += 1
            request = f"{self._who}-{batch.number}-{self._sequence}"
        header = Header(request, spec, self._meaning, batch.ids_RL.shape[1], batch.number)
        return self._retrying(request, batch.num_tokens_real, lambda line: receive(line, header))

    def fetch_head(self) -> Head:
        """The teacher's head (weight, bias, softcap, scale), checked against its checksum."""
        return self._retrying("head", 0, self._get_head)

    def teacher_stats(self) -> list[dict[str, Any]]:
        """Counters of every live rank."""

        def once() -> list[dict[str, Any]]:
            self._refresh()
            with self._lock:
                lines = sorted(self._lines.values(), key=lambda line: (line.endpoint.replica, line.endpoint.rank))
            return [self._calling(line, self._get_stats) for line in lines]

        return self._patiently("stats", once)

    def close(self) -> None:
        self._watchdog.close()
        for line in self._lines.values():
            line.client.close()

    # ---- which endpoint, and again ----

    def _retrying(self, request: str, tokens: int, attempt: Callable[[_Line], Answer]) -> Answer:
        def once() -> Answer:
            line = self._acquire(tokens)
            try:
                return self._calling(line, attempt)
            finally:
                self._release(line, tokens)

        return self._patiently(request, once)

    def _calling(self, line: _Line, attempt: Callable[[_Line], Answer]) -> Answer:
        """``attempt`` on one endpoint. Raises: _Retry; or what every endpoint would answer."""
        try:
            return attempt(line)
        except (fl.FlightError, pa.ArrowException, OSError) as error:
            fatal = _FATAL.get(getattr(error, "extra_info", b"").decode(errors="replace"))
            if fatal is not None:
                raise fatal(f"teacher {line.endpoint.address}: {_first_line(error)}") from error
            self._drop(line)
            raise _Retry(f"{line.endpoint.address}: {type(error).__name__}: {_first_line(error)}") from error

    def _patiently(self, request: str, once: Callable[[], Answer]) -> Answer:
        """``once`` until it serves.

        Raises:
            StreamError: it did not for ``stream.give_up_seconds``, counted from the last time the directory said that a
                teacher is being rebuilt: who rebuilds it says how often, and for how long.
        """
        since = time.monotonic()

        def give_up(state: tenacity.RetryCallState) -> bool:
            nonlocal since
            if _is_rebuilding(state):
                since = time.monotonic()
            return time.monotonic() - since >= self._settings.give_up_seconds

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Retry),
            wait=lambda state: (_WAIT_REBUILDING if _is_rebuilding(state) else _WAIT)(state),
            stop=give_up,
            before_sleep=lambda state: self._say_failed(request, state),
        )
        try:
            return retrying(once)
        except tenacity.RetryError as error:
            last = error.last_attempt.exception()
            raise StreamError(
                f"no teacher endpoint served request {request} for {self._settings.give_up_seconds:g} s"
                f" (stream.give_up_seconds); last fault: {last}"
            ) from last

    def _say_failed(self, request: str, state: tenacity.RetryCallState) -> None:
        fault = state.outcome.exception() if state.outcome else None
        if not isinstance(fault, _Rebuilding):
            _LOG.warning("request %s failed, trying again: %s", request, fault)
        # All requests in flight wait for the same thing: say it once a period, not once a request.
        elif time.monotonic() - self._said >= _SAY_S:
            self._said = time.monotonic()
            _LOG.warning("request %s and those after it wait: %s", request, fault)

    def _acquire(self, tokens: int) -> _Line:
        if not self._lines:
            self._refresh()
        with self._lock:
            if not self._lines:
                raise _Retry("the teacher's endpoints failed again at once")
            # Ties go to the rank that has served least, so that ranks share the work evenly.
            line = min(self._lines.values(), key=lambda one: (one.outstanding, one.served, one.endpoint.rank))
            line.outstanding += tokens
            line.served += tokens
            return line

    def _release(self, line: _Line, tokens: int) -> None:
        with self._lock:
            line.outstanding -= tokens

    def _drop(self, line: _Line) -> None:
        """Forget an endpoint that failed, and the others of its generation, which lives and dies as one; the directory is
        asked again when none is left."""
        failed = line.endpoint
        with self._lock:
            for other in list(self._lines):
                if other.replica == failed.replica and other.generation <= failed.generation:
                    del self._lines[other]

    def _refresh(self) -> None:
        """Keep lines to the endpoints that the directory lists now, and to no other: an older generation is gone.

        Raises: _Retry when it lists none.
        """
        try:
            listing = list_endpoints(self._access)
        except StreamError as error:
            raise _Retry(str(error)) from error
        with self._lock:
            before = self._lines
            self._lines = {
                endpoint: before.get(endpoint) or _Line(endpoint, connect(endpoint.address, self._access.credentials))
                for endpoint in self._mine(listing.endpoints)
            }
        if not listing.endpoints:
            if listing.rebuilding:
                raise _Rebuilding(f"the teacher is being rebuilt ({', '.join(listing.rebuilding)})")
            raise _Retry("the directory knows no live endpoint")

    def _mine(self, endpoints: list[Endpoint]) -> list[Endpoint]:
        """Rendezvous hashing: each student keeps a stable few, so connections don't grow as students x teachers."""

        def weight(endpoint: Endpoint) -> int:
            return xxhash.xxh3_64_intdigest(f"{self._who}|{endpoint.replica}|{endpoint.rank}".encode())

        return sorted(endpoints, key=weight)[: self._settings.endpoints_per_rank]

    # ---- one attempt ----

    def _exchange(self, line: _Line, header: Header, batch: TokenBatch) -> list[pa.RecordBatch]:
        rows = encode_rows(batch)
        descriptor = fl.FlightDescriptor.for_command(header.dump(self._access.token))
        writer, reader = line.client.do_exchange(descriptor)
        watch = self._watchdog.watch(reader)
        try:
            with writer:
                writer.begin(rows.schema)
                writer.write_batch(rows)
                writer.done_writing()
                return self._receive(reader, header, watch)
        except PayloadError as error:
            # Damaged on the way: the next attempt may come through whole.
            raise _Retry(f"{line.endpoint.address}: {error}") from error
        except fl.FlightCancelledError as error:
            if watch.fired:
                self._drop(line)
                raise _Retry(f"{line.endpoint.address}: no progress for {self._settings.stall_seconds:g} s") from error
            raise
        finally:
            self._watchdog.forget(watch)

    def _receive(self, reader: fl.FlightStreamReader, header: Header, watch: Watch) -> list[pa.RecordBatch]:
        """The answer's record batches: each agrees with its schema, declared size and checksum, all with the last one's count
        and digest."""
        meaning = self._meaning
        schema = target_schema(header.spec, meaning.vocab_size, meaning.hidden_size)
        digest = xxhash.xxh3_128()
        parts: list[pa.RecordBatch] = []
        count, progress, end = 0, -1, None
        while end is None:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                raise PayloadError(f"the answer to {header.request} ended without its last part") from None
            meta = json.loads(chunk.app_metadata.to_pybytes())
            if "progress" in meta:
                if meta["progress"] != progress:
                    progress = meta["progress"]
                    watch.progress()
                continue
            watch.progress()
            if meta.get("request") != header.request or meta.get("sequence") != len(parts):
                raise PayloadError(f"message {meta.get('request')}/{meta.get('sequence')} is not the one awaited")
            arrow.check(chunk.data, schema)
            if chunk.data.num_rows != meta["count"] or meta["start"] != count:
                raise PayloadError(f"{header.request}: {chunk.data.num_rows} rows where {meta['count']} are declared")
            if arrow.checksum(chunk.data, meta) != meta["checksum"]:
                raise PayloadError(f"{header.request}: part {meta['sequence']} does not agree with its checksum")
            parts.append(chunk.data)
            count += chunk.data.num_rows
            end = meta.get("end")
            if end is not None and (end != count or meta["digest"] != digest.hexdigest()):
                raise PayloadError(f"the answer to {header.request} does not agree with what its last part says of it")
            digest.update(meta["checksum"].encode())
        return parts

    def _get_stats(self, line: _Line) -> dict[str, Any]:
        return call(line.client, "stats", self._access.token, self._settings.stall_seconds)

    def _get_head(self, line: _Line) -> Head:
        ticket = fl.Ticket(message(self._access.token))
        options = fl.FlightCallOptions(timeout=self._settings.give_up_seconds)
        batches = line.client.do_get(ticket, options).read_all().combine_chunks().to_batches()
        return decode_head(batches[0])


def _is_rebuilding(state: tenacity.RetryCallState) -> bool:
    return state.outcome is not None and isinstance(state.outcome.exception(), _Rebuilding)


def _first_line(error: BaseException) -> str:
    return str(error).split(". gRPC client debug context", 1)[0].splitlines()[0] if str(error) else repr(error)
