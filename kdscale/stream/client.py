"""Pulls soft targets from whichever teacher rank is free, verifies every byte, and retries elsewhere."""

import json
import threading
import time
from dataclasses import dataclass
from typing import Any

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
_FATAL = {"IdentityError": IdentityError, "PayloadError": PayloadError}


class _Retry(Exception):
    """This attempt failed; another endpoint, or the same one later, may serve."""


@dataclass
class _Line:
    endpoint: Endpoint
    client: fl.FlightClient
    outstanding: int = 0
    served: int = 0


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
        self.bytes_received = 0
        self.tokens_received = 0

    # ---- the contract ----

    def fetch(self, batch: TokenBatch, spec: TargetSpec) -> SoftTargets:
        with self._lock:
            self._sequence += 1
            request = f"{self._who}-{batch.number}-{self._sequence}"
        header = Header(request, spec, self._meaning, batch.ids_RL.shape[1], batch.number)
        return self._retrying(request, batch.num_tokens_real, lambda line: self._exchange(line, header, batch))

    def fetch_head(self) -> Head:
        """The teacher's head (weight, bias, softcap, scale), checked against its checksum."""
        return self._retrying("head", 0, self._get_head)

    def teacher_stats(self) -> list[dict[str, Any]]:
        """Counters of every live rank."""
        self._refresh()
        lines = sorted(self._lines.values(), key=lambda line: (line.endpoint.replica, line.endpoint.rank))
        return [call(line.client, "stats", self._access.token, self._settings.stall_seconds) for line in lines]

    def close(self) -> None:
        for line in self._lines.values():
            line.client.close()

    # ---- which endpoint, and again ----

    def _retrying(self, request: str, tokens: int, attempt: Any) -> Any:
        def once() -> Any:
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

    def _exchange(self, line: _Line, header: Header, batch: TokenBatch) -> SoftTargets:
        rows = encode_rows(batch)
        descriptor = fl.FlightDescriptor.for_command(header.dump(self._access.token))
        writer, reader = line.client.do_exchange(descriptor)
        watchdog = _Watchdog(reader, self._settings.stall_seconds)
        try:
            with writer:
                writer.begin(rows.schema)
                writer.write_batch(rows)
                writer.done_writing()
                return self._receive(reader, header, watchdog)
        except PayloadError as error:
            # Damaged on the way: the next attempt may come through whole.
            raise _Retry(f"{line.endpoint.address}: {error}") from error
        except fl.FlightCancelledError as error:
            if watchdog.fired:
                self._drop(line)
                raise _Retry(f"{line.endpoint.address}: no progress for {self._settings.stall_seconds:g} s") from error
            raise
        finally:
            watchdog.stop()

    def _receive(self, reader: fl.FlightStreamReader, header: Header, watchdog: "_Watchdog") -> SoftTargets:
        meaning = self._meaning
        schema = target_schema(header.spec, meaning.vocab_size, meaning.hidden_size)
        digest = xxhash.xxh3_128()
        parts: list[SoftTargets] = []
        count, progress = 0, -1
        while True:
            try:
                chunk = reader.read_chunk()
            except StopIteration:
                raise PayloadError(f"the answer to {header.request} ended without its trailer") from None
            meta = json.loads(chunk.app_metadata.to_pybytes())
            if "progress" in meta:
                if meta["progress"] != progress:
                    progress = meta["progress"]
                    watchdog.progress()
                continue
            watchdog.progress()
            if meta.get("request") != header.request or meta.get("sequence") != len(parts):
                raise PayloadError(f"message {meta.get('request')}/{meta.get('sequence')} is not the one awaited")
            if "end" in meta:
                if meta["end"] != count or meta["digest"] != digest.hexdigest():
                    raise PayloadError(f"the answer to {header.request} does not agree with its trailer")
                break
            arrow.check(chunk.data, schema)
            if chunk.data.num_rows != meta["count"] or meta["start"] != count:
                raise PayloadError(f"{header.request}: {chunk.data.num_rows} rows where {meta['count']} are declared")
            if arrow.checksum(chunk.data, meta) != meta["checksum"]:
                raise PayloadError(f"{header.request}: part {meta['sequence']} does not agree with its checksum")
            digest.update(meta["checksum"].encode())
            parts.append(decode(chunk.data, header.spec, meaning.vocab_size))
            count += len(parts[-1])
            self.bytes_received += chunk.data.nbytes
        self.tokens_received += count
        return SoftTargets.join(parts)

    def _get_head(self, line: _Line) -> Head:
        ticket = fl.Ticket(message(self._access.token))
        options = fl.FlightCallOptions(timeout=self._settings.give_up_seconds)
        batches = line.client.do_get(ticket, options).read_all().combine_chunks().to_batches()
        return decode_head(batches[0])


class _Watchdog:
    """Cancels a read that makes no progress; gRPC's own keep-alive would take a minute and harm idle streams."""

    def __init__(self, reader: fl.FlightStreamReader, limit_s: float) -> None:
        self._reader = reader
        self._limit_s = limit_s
        self.fired = False
        self._deadline = time.monotonic() + limit_s
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="stall-watchdog").start()

    def _watch(self) -> None:
        while not self._stopped.wait(max(0.0, self._deadline - time.monotonic())):
            if time.monotonic() >= self._deadline:
                self.fired = True
                self._reader.cancel()
                return

    def progress(self) -> None:
        self._deadline = time.monotonic() + self._limit_s

    def stop(self) -> None:
        self._stopped.set()


def _first_line(error: BaseException) -> str:
    return str(error).split(". gRPC client debug context", 1)[0].splitlines()[0] if str(error) else repr(error)
