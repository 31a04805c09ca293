"""Pulls soft targets from whichever teacher rank is free, verifies every byte, and retries elsewhere."""

import json
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.flight as fl
import tenacity
import xxhash

from kdscale import log
from kdscale.batch import Batch, SoftTargets
from kdscale.config.sections import StreamSection
from kdscale.config.teachers import ALONE
from kdscale.errors import IdentityError, PayloadError, StreamError
from kdscale.head import Head
from kdscale.spec import TargetSpec
from kdscale.stream.lines import Exchange, Line, Lines, Rebuilding, Retry
from kdscale.stream.protocol import Access, Header, Meaning, call, connect, message
from kdscale.stream.server import decode_head
from kdscale.stream.source import Received
from kdscale.stream.watchdog import Watch, Watchdog
from kdscale.targets import arrow
from kdscale.targets.decode import decode
from kdscale.targets.layout import schema as target_schema
from kdscale.targets.layout import schema_bytes

_LOG = log.get(__name__)
Answer = TypeVar("Answer")
_SAY_S = 5.0
_FATAL = {"IdentityError": IdentityError, "PayloadError": PayloadError}
_WAIT = tenacity.wait_random_exponential(multiplier=0.2, max=5.0)
_WAIT_REBUILDING = tenacity.wait_random(0.3, 0.7)


class FlightSource:
    """A ``TargetSource`` over the live endpoints of a run's teacher. Safe to call from several threads."""

    def __init__(
        self,
        access: Access,
        meaning: Meaning,
        settings: StreamSection,
        who: str,
        *,
        by_row: bool = False,
        teacher: str = ALONE,
    ) -> None:
        """``by_row``: ask for each row by a request of its own, so that its targets depend, to the last bit, on nothing else.
        ``teacher``: the one among several that is asked."""
        self._access = access
        self.by_row = by_row
        self._meaning = meaning
        self._settings = settings
        self._who = who
        self._lock = threading.Lock()
        self._sequence = 0
        self._said = float("-inf")
        self._watchdog = Watchdog(settings.stall_seconds)
        self._lines = Lines(access, who, settings.endpoints_per_rank, self._watchdog, teacher)
        self.received: dict[str, Received] = {}
        """What answers amounted to, by payload."""

    # ---- the contract ----

    def fetch(self, batch: Batch, spec: TargetSpec) -> SoftTargets:
        if self.by_row and batch.num_rows > 1:
            return SoftTargets.join([self.fetch(row, spec) for row in batch.rows()])

        def receive(line: Line, header: Header) -> SoftTargets:
            parts = self._exchange(line, header, batch)
            try:
                targets = SoftTargets.join([decode(part, spec, self._meaning.vocab_size) for part in parts])
            except PayloadError as error:
                raise Retry(f"{line.endpoint.address}: {error}") from error
            self.received.setdefault(spec.payload, Received()).add(parts)
            return targets

        return self._request(batch, spec, receive)

    def fetch_batches(self, batch: Batch, spec: TargetSpec) -> list[pa.RecordBatch]:
        """The verified record batches of an answer, as they travelled."""
        return self._request(batch, spec, lambda line, header: self._exchange(line, header, batch))

    def _request(self, batch: Batch, spec: TargetSpec, receive: Callable[[Line, Header], Answer]) -> Answer:
        # What no teacher could answer is no fault of an endpoint.
        target_schema(spec, self._meaning.vocab_size, self._meaning.hidden_size)
        with self._lock:
            self._sequence += 1
            request = f"{self._who}-{batch.number}-{self._sequence}"
        header = Header(request, spec, self._meaning, batch.inputs.shape[1], batch.number)
        return self._retrying(request, batch.num_tokens_real, lambda line: receive(line, header))

    def fetch_head(self) -> Head:
        """The teacher's head (weight, bias, softcap, scale), checked against its checksum."""
        return self._retrying("head", 0, self._get_head)

    def teacher_stats(self) -> list[dict[str, Any]]:
        """Counters of every live rank, by replica and rank."""

        def once() -> list[dict[str, Any]]:
            endpoints = sorted(self._lines.listing().endpoints, key=lambda one: (one.replica, one.rank))
            stats = []
            for endpoint in endpoints:
                with connect(endpoint.address, self._access.credentials) as client:
                    stats.append(self._calling(Line(endpoint, client), self._get_stats))
            return stats

        return self._patiently("stats", once)

    def close(self) -> None:
        self._lines.close()
        self._watchdog.close()

    # ---- which endpoint, and again ----

    def _retrying(self, request: str, tokens: int, attempt: Callable[[Line], Answer]) -> Answer:
        def once() -> Answer:
            line = self._lines.acquire(tokens)
            try:
                return self._calling(line, attempt)
            finally:
                self._lines.release(line, tokens)

        return self._patiently(request, once)

    def _calling(self, line: Line, attempt: Callable[[Line], Answer]) -> Answer:
        """``attempt`` on one endpoint. Raises: Retry; or what every endpoint would answer."""
        try:
            return attempt(line)
        except (fl.FlightError, pa.ArrowException, OSError) as error:
            fatal = _FATAL.get(getattr(error, "extra_info", b"").decode(errors="replace"))
            if fatal is not None:
                raise fatal(f"teacher {line.endpoint.address}: {_first_line(error)}") from error
            elsewhere = self._lines.drop(line.endpoint)
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise Retry(f"{line.endpoint.address}: {reason}", elsewhere=elsewhere) from error

    def _patiently(self, request: str, once: Callable[[], Answer]) -> Answer:
        """``once`` until it serves.

        Raises:
            StreamError: it did not for ``stream.give_up_seconds``, counted from the last time the directory said that a
                teacher is being rebuilt: who rebuilds it says how often, and for how long.
        """
        since = time.monotonic()
        try:
            return once()
        except Retry as error:
            # What plans the attempts is made for a request that needs more than one: few do, and small ones would feel it.
            failed = [error]

        def give_up(state: tenacity.RetryCallState) -> bool:
            nonlocal since
            if _is_rebuilding(state):
                since = time.monotonic()
            return time.monotonic() - since >= self._settings.give_up_seconds

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Retry),
            wait=_wait,
            stop=give_up,
            before_sleep=lambda state: self._say_failed(request, state),
        )

        def attempt() -> Answer:
            if failed:
                raise failed.pop()
            return once()

        try:
            return retrying(attempt)
        except tenacity.RetryError as error:
            last = error.last_attempt.exception()
            raise StreamError(
                f"no teacher endpoint served request {request} for {self._settings.give_up_seconds:g} s"
                f" (stream.give_up_seconds); last fault: {last}"
            ) from last

    def _say_failed(self, request: str, state: tenacity.RetryCallState) -> None:
        fault = state.outcome.exception() if state.outcome else None
        if not isinstance(fault, Rebuilding):
            _LOG.warning("request %s failed, trying again: %s", request, fault)
        # All requests in flight wait for the same thing: say it once a period, not once a request.
        elif time.monotonic() - self._said >= _SAY_S:
            self._said = time.monotonic()
            _LOG.warning("request %s and those after it wait: %s", request, fault)

    # ---- one attempt ----

    def _exchange(self, line: Line, header: Header, batch: Batch) -> list[pa.RecordBatch]:
        if (idle := line.take(header)) is not None:
            try:
                return self._ask(line, idle, header, batch)
            except (fl.FlightUnavailableError, fl.FlightInternalError, fl.FlightCancelledError, OSError) as error:
                if getattr(error, "extra_info", b""):
                    raise  # what the teacher itself has said
                # The connection may have been lost while nobody asked, which says nothing of the endpoint now.
                _LOG.debug("%s: an open exchange failed (%s); making one anew", line.endpoint.address, error)
        return self._ask(line, Exchange(line.client, header, self._access.token), header, batch)

    def _ask(self, line: Line, exchange: Exchange, header: Header, batch: Batch) -> list[pa.RecordBatch]:
        watch = self._watchdog.watch(exchange.reader, line.endpoint)
        whole = False
        try:
            exchange.ask(header, batch)
            parts = self._receive(exchange.reader, header, watch)
            whole = watch.cancelled_for is None
            return parts
        except PayloadError as error:
            # Damaged on the way: the next attempt may come through whole.
            raise Retry(f"{line.endpoint.address}: {error}") from error
        except (fl.FlightError, pa.ArrowException, OSError) as error:
            if watch.cancelled_for is not None:
                elsewhere = self._lines.drop(line.endpoint)
                raise Retry(f"{line.endpoint.address}: {watch.cancelled_for}", elsewhere=elsewhere) from error
            raise
        finally:
            self._watchdog.forget(watch)
            # Nothing may be left in an exchange that others will use.
            if whole:
                line.give(exchange)
            else:
                exchange.close()

    def _receive(self, reader: fl.FlightStreamReader, header: Header, watch: Watch) -> list[pa.RecordBatch]:
        """The answer's record batches: each agrees with its schema, declared size and checksum, all with the last one's count
        and digest."""
        kind = (header.spec, self._meaning.vocab_size, self._meaning.hidden_size)
        schema, schema_raw = target_schema(*kind), schema_bytes(*kind)
        digest = xxhash.xxh3_128()
        parts: list[pa.RecordBatch] = []
        count, progress, end = 0, -1, None
        while end is None:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                raise PayloadError(f"the answer to {header.request} ended without its last part") from None
            said = chunk.app_metadata.to_pybytes() if chunk.app_metadata is not None else b""
            if said.startswith(b"{"):
                now = _stated(said, "progress")["progress"]
                if now != progress:
                    progress = now
                    watch.progress()
                continue
            watch.progress()
            checksum, stated = said[: arrow.CHECKSUM_DIGITS], said[arrow.CHECKSUM_DIGITS :]
            meta = _stated(stated, "request", "sequence", "start", "count")
            if meta["request"] != header.request or meta["sequence"] != len(parts):
                raise PayloadError(f"message {meta['request']}/{meta['sequence']} is not the one awaited")
            arrow.check(chunk.data, schema)
            if chunk.data.num_rows != meta["count"] or meta["start"] != count:
                raise PayloadError(f"{header.request}: {chunk.data.num_rows} rows where {meta['count']} are declared")
            if arrow.checksum(chunk.data, schema_raw, stated).encode() != checksum:
                raise PayloadError(f"{header.request}: part {meta['sequence']} does not agree with its checksum")
            parts.append(chunk.data)
            count += chunk.data.num_rows
            end = meta.get("end")
            if end is not None and (end != count or meta.get("digest") != digest.hexdigest()):
                raise PayloadError(f"the answer to {header.request} does not agree with what its last part says of it")
            digest.update(checksum)
        return parts

    def _get_stats(self, line: Line) -> dict[str, Any]:
        return call(line.client, "stats", self._access.token, self._settings.stall_seconds)

    def _get_head(self, line: Line) -> Head:
        ticket = fl.Ticket(message(self._access.token))
        options = fl.FlightCallOptions(timeout=self._settings.give_up_seconds)
        batches = line.client.do_get(ticket, options).read_all().combine_chunks().to_batches()
        try:
            return decode_head(batches[0])
        except PayloadError as error:
            raise Retry(f"{line.endpoint.address}: {error}") from error


def _stated(raw: bytes, *names: str) -> dict[str, Any]:
    """What a message says of itself. Raises: PayloadError for what no server has said."""
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise PayloadError(f"an answer's metadata are no JSON ({error})") from error
    if not isinstance(fields, dict) or not fields.keys() >= set(names):
        raise PayloadError(f"an answer's metadata have not all of {', '.join(names)}")
    return fields


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds before the next attempt."""
    fault = state.outcome.exception() if state.outcome is not None else None
    if isinstance(fault, Retry) and fault.elsewhere:
        return 0.0
    return (_WAIT_REBUILDING if isinstance(fault, Rebuilding) else _WAIT)(state)


def _is_rebuilding(state: tenacity.RetryCallState) -> bool:
    return state.outcome is not None and isinstance(state.outcome.exception(), Rebuilding)


def _first_line(error: BaseException) -> str:
    return str(error).split(". gRPC client debug context", 1)[0].splitlines()[0] if str(error) else repr(error)
