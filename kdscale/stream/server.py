"""The Flight server of one teacher rank: requests in, checksummed record batches out.

An exchange is a ``DoExchange`` that stays open for one request after another, all of one kind: what is asked for row by row, as
recordings and deterministic runs do, would feel the making of each. All of it runs in Flight's own threads.
"""

import json
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.flight as fl
import torch
import xxhash

from kdscale.batch import Batch, SoftTargets
from kdscale.credentials import Credentials
from kdscale.errors import IdentityError, KdscaleError, PayloadError, StreamError
from kdscale.head import Head, HeadSpec
from kdscale.stream.protocol import (
    Header,
    Meaning,
    decode_request,
    listening,
    open_message,
    require_same_meaning,
)
from kdscale.targets import arrow
from kdscale.targets.encode import encode
from kdscale.targets.layout import schema as target_schema
from kdscale.targets.layout import schema_bytes

_PART_BYTES = 2 << 20
"""Of one message: large enough that its own cost is small, small enough that sending and checking overlap."""
_HEAD_PART_BYTES = 64 << 20
_HEARTBEAT_S = 2.0
# Faults that another endpoint would repeat: the client must not retry them.
_FATAL = (IdentityError, PayloadError)

Answer = SoftTargets | Head | KdscaleError


class Scorer(Protocol):
    """What computes the answers: one rank of a teacher."""

    def submit(self, request: str, batch: Batch | None, header: Header | None) -> "queue.SimpleQueue[Answer]":
        """Queue a request (none of both: the head); its one answer arrives in the returned queue."""
        ...

    def progress(self) -> int:
        """A number that grows as forwards advance."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters of this rank."""
        ...


class TargetServer(fl.FlightServerBase):
    """Serves one rank's ``Scorer`` on ``host`` at a free port."""

    def __init__(
        self, host: str, token: str, meaning: Meaning, scorer: Scorer, credentials: Credentials | None = None
    ) -> None:
        """Plain without ``credentials``. Raises: PlacementError when that would be off loopback."""
        super().__init__(**listening(host, 0, credentials))
        self.address = f"{host}:{self.port}"
        self._token = token
        self._meaning = meaning
        self._scorer = scorer
        self._lock = threading.Lock()
        self.in_flight = 0
        """Requests in hand; an idle exchange is none. Any thread may read it."""

    def do_exchange(
        self,
        context: fl.ServerCallContext,
        descriptor: fl.FlightDescriptor,
        reader: fl.MetadataRecordBatchReader,
        writer: fl.MetadataRecordBatchWriter,
    ) -> None:
        try:
            kind = Header.opened(descriptor.command, self._token)
        except StreamError as error:
            raise fl.FlightUnauthenticatedError(str(error)) from error
        try:
            require_same_meaning(kind.meaning, self._meaning)
            # What the client can take up while its rows are on their way.
            writer.begin(target_schema(kind.spec, self._meaning.vocab_size, self._meaning.hidden_size))
        except KdscaleError as error:
            raise _as_flight_error(error) from error
        while (chunk := _next(reader)) is not None:
            served = self._serve(kind, chunk, context, writer)
            del chunk  # an idle exchange keeps neither rows nor an answer
            if not served:
                return

    def _serve(
        self,
        kind: Header,
        chunk: fl.FlightStreamChunk,
        context: fl.ServerCallContext,
        writer: fl.MetadataRecordBatchWriter,
    ) -> bool:
        """One request; whether the client is still there."""
        with self._lock:
            self.in_flight += 1
        try:
            raw = chunk.app_metadata.to_pybytes() if chunk.app_metadata is not None else b""
            header, batch = decode_request(raw, chunk.data, kind, self._meaning.vocab_size)
            targets = self._answer(self._scorer.submit(header.request, batch, header), context, writer)
            if targets is None:
                return False
            assert not isinstance(targets, Head)
            _write(writer, header, targets)
            return True
        except KdscaleError as error:
            raise _as_flight_error(error) from error
        finally:
            with self._lock:
                self.in_flight -= 1

    def do_get(self, context: fl.ServerCallContext, ticket: fl.Ticket) -> fl.FlightDataStream:
        """The head: its weight's rows as bytes, everything else in the schema's metadata."""
        try:
            open_message(ticket.ticket, self._token)
        except StreamError as error:
            raise fl.FlightUnauthenticatedError(str(error)) from error
        head = self._answer(self._scorer.submit("head", None, None), context, None)
        assert isinstance(head, Head)
        batch = encode_head(head)
        # Flight takes no message of 2 GiB, and heads may be larger.
        rows = max(1, _HEAD_PART_BYTES * len(batch) // max(1, batch.nbytes))
        parts = [batch.slice(start, rows) for start in range(0, len(batch), rows)]
        return fl.RecordBatchStream(pa.Table.from_batches(parts))

    def do_action(self, context: fl.ServerCallContext, action: fl.Action) -> Iterator[fl.Result]:
        try:
            open_message(action.body.to_pybytes(), self._token)
        except StreamError as error:
            raise fl.FlightUnauthenticatedError(str(error)) from error
        if action.type != "stats":
            raise fl.FlightServerError(f"unknown action {action.type!r}; this is a teacher rank, it knows 'stats'")
        yield fl.Result(json.dumps(self._scorer.stats()).encode())

    def _answer(
        self,
        answers: "queue.SimpleQueue[Answer]",
        context: fl.ServerCallContext,
        writer: fl.MetadataRecordBatchWriter | None,
    ) -> SoftTargets | Head | None:
        # While the request waits its turn, tell the client how far the forwards are: a queue is not a stall.
        while True:
            try:
                answer = answers.get(timeout=_HEARTBEAT_S)
            except queue.Empty:
                if context.is_cancelled():
                    return None
                if writer is not None:
                    writer.write_metadata(json.dumps({"progress": self._scorer.progress()}).encode())
                continue
            if isinstance(answer, KdscaleError):
                raise answer
            return answer


def _as_flight_error(error: KdscaleError) -> fl.FlightError:
    """A fault of ours as what Flight tells the other side."""
    kind = fl.FlightServerError if isinstance(error, _FATAL) else fl.FlightUnavailableError
    return kind(str(error), extra_info=type(error).__name__.encode())


def _next(reader: fl.MetadataRecordBatchReader) -> fl.FlightStreamChunk | None:
    """The rows of the next request; none once the client asks for nothing more."""
    try:
        return reader.read_chunk()
    except StopIteration:
        return None


def _write(writer: fl.MetadataRecordBatchWriter, header: Header, targets: SoftTargets) -> None:
    """Send the answer in parts: the client takes up one while the next is made."""
    for part in _parts(header, targets):
        writer.write_with_metadata(*part)


def _sizes(targets: SoftTargets) -> list[int]:
    """Positions of each part: a small one first, so that the client has something to do soon, then as even as can be: a small
    rest would cost as much on its way as a large part does."""
    total, size = len(targets), sum(tensor.nbytes for tensor in targets.tensors())
    first = total * _PART_BYTES // (4 * max(1, size))
    if size <= _PART_BYTES or not 0 < first < total:
        return [total]
    rest = total - first
    each = -(-rest // max(1, round(rest * size / total / _PART_BYTES)))
    return [first, *[each] * (rest // each), *([rest % each] if rest % each else [])]


def _parts(header: Header, targets: SoftTargets) -> Iterator[tuple[pa.RecordBatch, bytes]]:
    """Record batches, each with metadata: its checksum, and what it is; the last one's also how much the whole is."""
    kind = (header.spec, header.meaning.vocab_size, header.meaning.hidden_size)
    schema, schema_raw = target_schema(*kind), schema_bytes(*kind)
    digest = xxhash.xxh3_128()
    start = 0
    for sequence, part in enumerate(targets.split(_sizes(targets))):
        batch = encode(part, header.spec, schema, header.meaning.vocab_size)
        count = len(part)
        meta: dict[str, Any] = {"request": header.request, "sequence": sequence, "start": start, "count": count}
        start += count
        if start == len(targets):
            meta |= {"end": start, "digest": digest.hexdigest()}
        stated = arrow.stated(meta)
        checksum = arrow.checksum(batch, schema_raw, stated).encode()
        digest.update(checksum)
        yield batch, checksum + stated


_NOTHING = arrow.stated({})
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def encode_head(head: Head) -> pa.RecordBatch:
    """One row per vocabulary entry: the weight's bytes, and the bias where there is one (float32)."""
    weight = head.weight_VD[: head.spec.vocab_size].contiguous()
    width = weight.shape[1] * weight.element_size()
    fields = [pa.field("weight", pa.binary(width), nullable=False)]
    columns: list[arrow.Column] = [weight.view(torch.uint8).numpy()]
    if head.bias_V is not None:
        fields.append(pa.field("bias", pa.float32(), nullable=False))
        columns.append(head.bias_V[: head.spec.vocab_size].float().numpy())
    meta = {"dtype": str(weight.dtype).removeprefix("torch."), "spec": asdict(head.spec)}
    schema = pa.schema(fields, metadata={"kdscale": json.dumps(meta)})
    batch = arrow.record_batch(columns, schema)
    checksum = arrow.checksum(batch, schema.serialize().to_pybytes(), _NOTHING)
    return batch.replace_schema_metadata({"kdscale": json.dumps(meta), "checksum": checksum})


def decode_head(batch: pa.RecordBatch) -> Head:
    """Raises: PayloadError for damaged bytes or an unknown dtype."""
    metadata = dict(batch.schema.metadata or {})
    checksum = metadata.pop(b"checksum", b"").decode()
    batch = batch.replace_schema_metadata(metadata)
    batch.validate(full=True)
    if arrow.checksum(batch, batch.schema.serialize().to_pybytes(), _NOTHING) != checksum:
        raise PayloadError("the teacher's head arrived damaged: its checksum does not agree")
    meta = json.loads(metadata[b"kdscale"])
    if meta["dtype"] not in _DTYPES:
        raise PayloadError(f"the teacher's head has dtype {meta['dtype']!r}; known are {', '.join(_DTYPES)}")
    width = batch.schema.field("weight").type.byte_width
    weight = torch.from_numpy(arrow.plane(batch, "weight", "u1", width).copy()).view(_DTYPES[meta["dtype"]])
    bias = torch.from_numpy(arrow.plane(batch, "bias", "<f4").copy()) if len(batch.schema) == 2 else None
    return Head(weight_VD=weight, bias_V=bias, spec=HeadSpec(**meta["spec"]))
