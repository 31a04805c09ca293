"""What client and server say to each other: headers, metadata, endpoints. JSON, never pickle."""

import hmac
import json
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl

from kdscale.batch import Batch, ExampleBatch, TokenBatch
from kdscale.credentials import RUN_NAME, Credentials, Keys
from kdscale.errors import IdentityError, PayloadError, StreamError
from kdscale.spec import TargetSpec, Task
from kdscale.targets import arrow
from kdscale.tunnel import is_loopback, require_loopback

PROTOCOL = 5
# gRPC gives a connection 20 s to come about, in which nothing can cancel the call: too long for a server that is stopped.
_CONNECTING = [("grpc.min_reconnect_backoff_ms", 4000)]


@dataclass(frozen=True)
class Meaning:
    """What a teacher's numbers mean. A student refuses another meaning than its own."""

    teacher: str
    """Digest of the model's config and weights index."""
    tokenizer: str
    """Fingerprint of the tokenizer; where images are read, of how their pixels are."""
    vocab_size: int
    """What a distribution is over: tokens, or classes."""
    hidden_size: int
    task: Task = "language-modelling"
    input_size: int = 0
    """Of classifiers: how many token ids a text may hold, or bytes of an image."""


@dataclass(frozen=True)
class Known:
    """A teacher that was found before anything started."""

    directory: str
    """Where the driver's node has its model."""
    meaning: Meaning


@dataclass(frozen=True)
class Endpoint:
    """One teacher rank's Flight address."""

    replica: str
    generation: int
    rank: int
    address: str
    """``host:port``."""


@dataclass(frozen=True)
class Access:
    """Where the endpoint directory listens, and the secrets that open it and the endpoints."""

    directory: str
    """``host:port``."""
    token: str
    credentials: Credentials | None = None
    """With which every connection is made; none: directory and endpoints listen plainly, on loopback."""

    @property
    def keys(self) -> Keys | None:
        return Keys(self.credentials, self.token) if self.credentials is not None else None

    def save(self, path: Path) -> None:
        """Write for runs elsewhere; readable by this user alone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(self), file)

    @staticmethod
    def load(path: Path) -> "Access":
        """Raises: StreamError when the file is missing or not an access file."""
        try:
            fields = json.loads(path.read_text())
            credentials = fields.pop("credentials", None)
            return Access(**fields, credentials=Credentials(**credentials) if credentials else None)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise StreamError(f"{path} is no access file of a served teacher: {error}") from error

    def __repr__(self) -> str:
        return f"Access(directory={self.directory!r}, token=..., tls={self.credentials is not None})"


@dataclass(frozen=True)
class Header:
    """A request's identity, and what it expects of the teacher: the latter opens an exchange, the former comes with the rows."""

    request: str
    spec: TargetSpec
    meaning: Meaning
    num_columns: int
    """Row length L."""
    number: int = 0
    """Batch number, on which ``sampled`` draws depend."""

    def opening(self, token: str) -> bytes:
        """What all requests of an exchange have in common."""
        return message(token, kind=_kind_text(self.spec, self.meaning), num_columns=self.num_columns)

    def asking(self) -> bytes:
        """What is this one's own."""
        return json.dumps({"request": self.request, "number": self.number}).encode()

    @staticmethod
    def opened(raw: bytes, token: str) -> "Header":
        """Of no request yet. Raises: StreamError for another token, version or a malformed opening."""
        fields = open_message(raw, token)
        try:
            spec, meaning = _kind_of(fields["kind"])
            return Header("", spec, meaning, int(fields["num_columns"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StreamError(f"malformed opening of an exchange: {error!r}") from error

    def of(self, raw: bytes) -> "Header":
        """The request that comes with these ``asking`` bytes. Raises: StreamError when they are malformed."""
        try:
            fields = json.loads(raw)
            request, number = str(fields["request"]), int(fields["number"])
        except (KeyError, TypeError, ValueError) as error:
            raise StreamError(f"malformed request: {error!r}") from error
        if abs(number) >= 1 << 63:
            raise StreamError(f"malformed request: batch number {number} is not one of 64 bits")
        return Header(request, self.spec, self.meaning, self.num_columns, number)


# A run's requests are of a few kinds: what says which is written, and read, once.
@lru_cache(maxsize=64)
def _kind_text(spec: TargetSpec, meaning: Meaning) -> str:
    return json.dumps({"spec": spec.as_dict(), "meaning": vars(meaning)})


@lru_cache(maxsize=64)
def _kind_of(text: str) -> tuple[TargetSpec, Meaning]:
    fields = json.loads(text)
    return TargetSpec.of(fields["spec"]), Meaning(**fields["meaning"])


def message(token: str, **fields: Any) -> bytes:
    """A message that carries the run's token."""
    return json.dumps({"protocol": PROTOCOL, "token": token, **fields}).encode()


def open_message(raw: bytes, token: str) -> dict[str, Any]:
    """The fields of a message with our token, compared in constant time. Raises: StreamError."""
    try:
        fields: dict[str, Any] = json.loads(raw)
        given, protocol = str(fields["token"]), fields["protocol"]
    except (ValueError, KeyError, TypeError) as error:
        raise StreamError("malformed message: not a JSON object with token and protocol") from error
    if not hmac.compare_digest(given.encode(), token.encode()):
        raise StreamError("refused: the message carries another run's token")
    if protocol != PROTOCOL:
        raise StreamError(f"refused: protocol {protocol!r}, this side speaks {PROTOCOL}")
    return fields


def require_same_meaning(asked: Meaning, served: Meaning) -> None:
    """Raises: IdentityError naming every field that differs."""
    if asked == served:
        return
    differ = [
        f"{name}: asked for {value!r}, served {getattr(served, name)!r}"
        for name, value in asdict(asked).items()
        if value != getattr(served, name)
    ]
    if differ:
        raise IdentityError("this teacher is not the one the run is about; " + "; ".join(differ))


# ---- rows on the way to the teacher ----


@lru_cache(maxsize=64)
def rows_schema(num_columns: int) -> pa.Schema:
    int_plane = pa.binary(4 * num_columns)
    return pa.schema(
        [
            pa.field("ids", int_plane, nullable=False),
            pa.field("segments", int_plane, nullable=False),
            pa.field("positions", int_plane, nullable=False),
            pa.field("predicts", pa.binary(num_columns), nullable=False),
        ]
    )


@lru_cache(maxsize=64)
def examples_schema(num_columns: int, item_bytes: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("inputs", pa.binary(item_bytes * num_columns), nullable=False),
            pa.field("length", pa.int32(), nullable=False),
            pa.field("label", pa.int32(), nullable=False),
            pa.field("trained", pa.uint8(), nullable=False),
        ]
    )


def schema_of_rows(batch: Batch) -> pa.Schema:
    """The schema of ``encode_rows``'s result."""
    if isinstance(batch, ExampleBatch):
        return examples_schema(batch.inputs_RL.shape[1], batch.inputs_RL.itemsize)
    return rows_schema(batch.ids_RL.shape[1])


def encode_rows(batch: Batch) -> pa.RecordBatch:
    if isinstance(batch, ExampleBatch):
        columns = [batch.inputs_RL, batch.lengths_R, batch.labels_R, batch.trained_R.view(np.uint8)]
    else:
        columns = [batch.ids_RL, batch.segments_RL, batch.positions_RL, batch.predicts_RL.view(np.uint8)]
    return arrow.record_batch(columns, schema_of_rows(batch))


def decode_request(raw: bytes, rows: pa.RecordBatch, kind: Header, vocab_size: int) -> tuple[Header, Batch]:
    """The request, of an exchange of ``kind``, that came with these ``Header.asking`` bytes, and the batch it is about.

    Raises:
        PayloadError: rows of another schema; tokens or classes outside the vocabulary.
        StreamError: what came with them is malformed.
    """
    header = kind.of(raw)
    if header.meaning.task != "language-modelling":
        return header, _decode_examples(rows, header)
    return header, _decode_tokens(rows, header, vocab_size)


def _decode_tokens(batch: pa.RecordBatch, header: Header, vocab_size: int) -> TokenBatch:
    num_columns = header.num_columns
    arrow.check(batch, rows_schema(num_columns))
    # Views of what has arrived: whoever reads them brings rows of several requests together, which copies.
    ids, segments, positions = (
        arrow.plane(batch, name, "<i4", num_columns) for name in ("ids", "segments", "positions")
    )
    # As unsigned numbers those below 0 are the largest.
    if ids.size and ids.view(np.uint32).max() >= vocab_size:
        raise PayloadError(f"token ids span {ids.min()}..{ids.max()}; the teacher's vocabulary has {vocab_size}")
    if positions.size and positions.view(np.uint32).max() >= num_columns:
        raise PayloadError(f"positions span {positions.min()}..{positions.max()}; rows have {num_columns} columns")
    predicts = arrow.plane(batch, "predicts", "u1", num_columns).astype(bool)
    return TokenBatch(
        number=header.number, ids_RL=ids, segments_RL=segments, positions_RL=positions, predicts_RL=predicts
    )


def _decode_examples(batch: pa.RecordBatch, header: Header) -> ExampleBatch:
    meaning, num_columns = header.meaning, header.num_columns
    of_images = meaning.task == "image-classification"
    if of_images and num_columns != meaning.input_size:
        raise PayloadError(f"an image has {num_columns} bytes; the teacher reads {meaning.input_size}")
    arrow.check(batch, examples_schema(num_columns, 1 if of_images else 4))
    inputs = arrow.plane(batch, "inputs", "u1" if of_images else "<i4", num_columns).copy()
    if not of_images and inputs.size and (inputs.min() < 0 or inputs.max() >= meaning.input_size):
        raise PayloadError(f"token ids span {inputs.min()}..{inputs.max()}; the tokenizer has {meaning.input_size}")
    lengths, labels = (arrow.plane(batch, name, "<i4").copy() for name in ("length", "label"))
    if labels.size and (labels.min() < 0 or labels.max() >= meaning.vocab_size):
        raise PayloadError(f"classes span {labels.min()}..{labels.max()}; the teacher has {meaning.vocab_size}")
    trained = arrow.plane(batch, "trained", "u1").astype(bool)
    return ExampleBatch(header.number, inputs, lengths, labels, trained)


# ---- listening, and calling a server ----


def listening(host: str, port: int, credentials: Credentials | None) -> dict[str, Any]:
    """The arguments with which a Flight server listens; with ``credentials`` it takes clients of its run alone.

    Raises: PlacementError for a plain listener off loopback.
    """
    if credentials is None:
        require_loopback(host)
        return {"location": f"grpc+tcp://{host}:{port}"}
    return {
        "location": f"grpc+tls://{host}:{port}",
        "tls_certificates": [(credentials.certificate_pem, credentials.key_pem)],
        "verify_client": True,
        "root_certificates": credentials.authority_pem,
    }


def connect(address: str, credentials: Credentials | None = None) -> fl.FlightClient:
    """A client of the server at ``address``; the connection itself is made by its first call.

    Raises: StreamError when a plain connection would leave loopback.
    """
    if credentials is None:
        if not is_loopback(address.rpartition(":")[0]):
            raise StreamError(
                f"no credentials for {address}, and off loopback the token may not travel plainly; take the access file"
                " that `kdscale teacher` has written"
            )
        return fl.connect(f"grpc+tcp://{address}", generic_options=_CONNECTING)
    return fl.connect(
        f"grpc+tls://{address}",
        generic_options=_CONNECTING,
        tls_root_certs=credentials.authority_pem,
        cert_chain=credentials.certificate_pem,
        private_key=credentials.key_pem,
        override_hostname=RUN_NAME,
    )


def call(client: fl.FlightClient, action: str, token: str, timeout_s: float, **fields: Any) -> dict[str, Any]:
    """One action, JSON both ways. Raises: pyarrow.flight.FlightError."""
    options = fl.FlightCallOptions(timeout=timeout_s)
    results = list(client.do_action(fl.Action(action, message(token, **fields)), options=options))
    answer: dict[str, Any] = json.loads(results[0].body.to_pybytes())
    return answer
