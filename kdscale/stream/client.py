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
from kdscale.targets import arrow
from kdscale.targets.decode import decode
from kdscale.targets.layout import schema as target_schema

_LOG = log.get(__name__)
Answer = TypeVar("Answer")
_FATAL = {"IdentityError": IdentityError, "PayloadError": PayloadError}


class _Retry(Exception):
    """This attempt failed; another endpoint, or the same one later, may serve."""


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
        self._watchdog = _Watchdog(settings.stall_seconds)
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
        self._refresh()
        lines = sorted(self._lines.values(), key=lambda line: (line.endpoint.replica, line.endpoint.rank))
        return [call(line.client, "stats", self._access.token, self._settings.stall_seconds) for line in lines]

    def close(self) -> None:
        self._watchdog.close()
        for line in self._lines.values():
            line.client.close()

    # ---- which endpoint, and again ----

    def _retrying(self, request: str, tokens: int, attempt: Callable[[_Line], Answer]) -> Answer:
        def once() -> Answer:
            line = self._acquire(tokens)
            try:
                return attempt(line)
            except (fl.FlightError, pa.ArrowException, OSError) as error:
                fatal = _FATAL.get(getattr(error, "extra_info", b"").decode(errors="replace"))
                if fatal is not None:
                    raise fatal(f"teacher {line.endpoint.address}: {_first_line(error)}") from error
                self._drop(line)
                raise _Retry(f"{line.endpoint.address}: {type(error).__name__}: {_first_line(error)}") from error
            finally:
                self._release(line, tokens)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Retry),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5.0),
            stop=tenacity.stop_after_delay(self._settings.give_up_seconds),
            before_sleep=lambda state: _LOG.warning(
                "request %s failed, trying again: %s", request, state.outcome.exception() if state.outcome else ""
            ),
        )
        try:
            return retrying(once)
        except tenacity.RetryError as error:
            last = error.last_attempt.exception()
            raise StreamError(
                f"no teacher endpoint served request {request} for {self._settings.give_up_seconds:g} s"
                f" (stream.give_up_seconds); last fault: {last}"
            ) from last

    def _acquire(self, tokens: int) -> _Line:
        if not self._lines:
            self._refresh()
        with self._lock:
            if not self._lines:
                raise _Retry("the directory knows no live endpoint")
            # Ties go to the rank that has served least, so that ranks share the work evenly.
            line = min(self._lines.values(), key=lambda one: (one.outstanding, one.served, one.endpoint.rank))
            line.outstanding += tokens
            line.served += tokens
            return line

    def _release(self, line: _Line, tokens: int) -> None:
        with self._lock:
            line.outstanding -= tokens

    def _drop(self, line: _Line) -> None:
        """Forget an endpoint that failed; the directory is asked again when none is left."""
        with self._lock:
            self._lines.pop(line.endpoint, None)

    def _refresh(self) -> None:
        try:
            endpoints, _ = list_endpoints(self._access)
        except StreamError as error:
            raise _Retry(str(error)) from error
        with self._lock:
            for endpoint in self._mine(endpoints):
                if endpoint not in self._lines:
                    self._lines[endpoint] = _Line(endpoint, connect(endpoint.address, self._access.credentials))

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

    def _receive(self, reader: fl.FlightStreamReader, header: Header, watch: "_Watch") -> list[pa.RecordBatch]:
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

    def _get_head(self, line: _Line) -> Head:
        ticket = fl.Ticket(message(self._access.token))
        options = fl.FlightCallOptions(timeout=self._settings.give_up_seconds)
        batches = line.client.do_get(ticket, options).read_all().combine_chunks().to_batches()
        return decode_head(batches[0])


class _Watch:
    """One read that is being watched."""

    def __init__(self, reader: fl.FlightStreamReader) -> None:
        self.reader = reader
        self.fired = False
        self.progress()

    def progress(self) -> None:
        self.seen = time.monotonic()


class _Watchdog:
    """Cancels reads that make no progress; gRPC's own keep-alive would take a minute and harm idle streams."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._watches: set[_Watch] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="stall-watchdog").start()

    def watch(self, reader: fl.FlightStreamReader) -> _Watch:
        watch = _Watch(reader)
        self._watches.add(watch)
        return watch

    def forget(self, watch: _Watch) -> None:
        self._watches.discard(watch)

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(min(1.0, self._limit_s / 10)):
            now = time.monotonic()
            for watch in list(self._watches):
                if now - watch.seen >= self._limit_s and not watch.fired:
                    watch.fired = True
                    watch.reader.cancel()


def _first_line(error: BaseException) -> str:
    return str(error).split(". gRPC client debug context", 1)[0].splitlines()[0] if str(error) else repr(error)
