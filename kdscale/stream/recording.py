"""Soft targets on disk: the record batches that travelled, one for each row of tokens, found again by the row itself.

    OUT/PROVENANCE.json        what the numbers mean: teacher, tokenizer, corpus, packing, payload; written first
        train-00000.arrow      Arrow files; the metadata of a record batch holds its row's key and its checksum
        heldout-00000.arrow    final hidden states of the held-out rows
        head.arrow             the teacher's head, by which those become distributions
        MANIFEST.json          sha256 of every file; written last: what makes a recording whole

A soft target is a pure function of (teacher, tokens, request), so a row's tokens are its key: a recording stays true under
another shuffle, batch size or number of ranks.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from kdscale.batch import Batch, SoftTargets
from kdscale.config.schema import RunConfig
from kdscale.durable import write_durably
from kdscale.errors import CoverageError, IdentityError, PayloadError, RecordingError
from kdscale.head import Head
from kdscale.spec import TargetSpec
from kdscale.stream.protocol import Meaning
from kdscale.stream.server import decode_head, encode_head
from kdscale.stream.source import Received
from kdscale.stream.whole import MANIFEST
from kdscale.targets import arrow
from kdscale.targets.decode import decode
from kdscale.targets.layout import VERSION, row_bytes, schema_bytes
from kdscale.targets.layout import schema as target_schema

_PROVENANCE, _HEAD = "PROVENANCE.json", "head.arrow"
_SHARD = re.compile(r"([a-z0-9]+(?:-r\d+)?)-(\d{5})\.arrow")
_SHARD_BYTES = 64 << 20
"""What at most is recorded again after a kill."""
_OPEN_SHARDS = 128


@dataclass(frozen=True)
class Provenance:
    """What a recording's numbers mean; one of another meaning is refused."""

    meaning: Meaning
    corpus: str
    """Fingerprint of the tokenized text."""
    rows: str
    """How it is cut into rows."""
    targets: TargetSpec

    @staticmethod
    def of(config: RunConfig, meaning: Meaning, corpus: str) -> "Provenance":
        """What the config's first step asks a teacher of ``meaning`` for, on the text of fingerprint ``corpus``."""
        return Provenance(meaning, corpus, f"{config.data.packing} {config.data.row_tokens}", config.target_spec(0))

    def as_dict(self) -> dict[str, Any]:
        return {"version": 1, "layout": VERSION, **asdict(self), "targets": self.targets.as_dict()}


def row_key(row: Batch) -> bytes:
    """16 bytes that stand for a row: its tokens, documents and trained positions, wherever it stands in a run."""
    digest = xxhash.xxh3_128()
    for plane in row.planes():
        digest.update(plane.tobytes())
    return digest.digest()


class RecordingWriter:
    """Appends rows to shards ``NAME-NUMBER.arrow``; a shard appears whole, by renaming. One writer for each name.

    What stood in an unfinished shard when its process died is recorded again.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        spec: TargetSpec,
        meaning: Meaning,
        row_tokens: int,
        *,
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        self._directory, self._name = directory, name
        self._schema = target_schema(spec, meaning.vocab_size, meaning.hidden_size)
        self._schema_bytes = schema_bytes(spec, meaning.vocab_size, meaning.hidden_size)
        # The same rows fall into the same shards, however often recording was interrupted.
        self._rows_per_shard = max(
            1, shard_bytes // (row_tokens * row_bytes(spec, meaning.vocab_size, meaning.hidden_size))
        )
        self._number = 1 + max((number for stem, number, _ in _shards(directory) if stem == name), default=-1)
        self._rows = 0
        self._writer: pa.RecordBatchFileWriter | None = None

    def add(self, key: bytes, parts: list[pa.RecordBatch]) -> None:
        """A row's answer, as it arrived and was verified. Raises: RecordingError when it cannot be written."""
        batch = pa.concat_batches(parts)
        meta = {"key": key.hex()}
        meta["checksum"] = arrow.checksum(batch, self._schema_bytes, arrow.stated(meta))
        with _writing(self._partial):
            if self._writer is None:
                self._file = pa.OSFile(str(self._partial), "wb")
                self._writer = pa.ipc.new_file(self._file, self._schema)
            self._writer.write_batch(batch, custom_metadata=meta)
        self._rows += 1
        if self._rows == self._rows_per_shard:
            self.flush()

    def flush(self) -> None:
        """Finish the shard in progress. Raises: RecordingError."""
        if self._writer is None:
            return
        with _writing(self._partial):
            self._writer.close()
            self._file.close()
            with self._partial.open("rb") as file:
                os.fsync(file.fileno())
            self._partial.rename(self._directory / f"{self._name}-{self._number:05}.arrow")
        self._writer = None
        self._number, self._rows = self._number + 1, 0

    @property
    def _partial(self) -> Path:
        return self._directory / f".{self._name}-{self._number:05}.partial"


def _open(shard: Path) -> pa.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(shard)))


class Recording:
    """The finished shards of a directory. A ``TeacherSource`` without a teacher; safe to call from several threads.

    Raises:
        RecordingError: no recording, or a shard that is no Arrow file.
        IdentityError: it means something else than ``expected``; every difference is named.
    """

    def __init__(self, directory: Path, expected: Provenance) -> None:
        self._directory = directory
        self._meaning = expected.meaning
        require_provenance(directory, expected)
        self._places: dict[tuple[str, bytes], tuple[Path, int]] = {}
        self._schemas: dict[Path, pa.Schema] = {}
        # A large recording has more shards than a process may have files open.
        self._reader = lru_cache(maxsize=_OPEN_SHARDS)(_open)
        self.received: dict[str, Received] = {}
        """What was read, by payload."""
        self.refresh()

    def refresh(self) -> None:
        """Take in shards that were finished meanwhile."""
        for name, _, path in _shards(self._directory):
            if path in self._schemas:
                continue
            try:
                reader = _open(path)
                found = {}
                for number in range(reader.num_record_batches):
                    meta = reader.get_batch_with_custom_metadata(number).custom_metadata
                    found[name.partition("-")[0], bytes.fromhex(meta[b"key"].decode())] = path, number
            except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
                raise RecordingError(
                    f"{path} is damaged ({error}); remove it and record again: rows that are left are kept"
                ) from error
            # In this order: other threads look rows up meanwhile.
            self._schemas[path] = reader.schema
            self._places.update(found)

    def __contains__(self, row: tuple[str, Batch]) -> bool:
        part, tokens = row
        return (part, row_key(tokens)) in self._places

    def holds(self, row: Batch, spec: TargetSpec) -> bool:
        """Whether ``fetch`` has the targets of ``spec`` for a batch of one row."""
        return self._place(row_key(row), spec) is not None

    def _place(self, key: bytes, spec: TargetSpec) -> tuple[Path, int] | None:
        expected = target_schema(spec, self._meaning.vocab_size, self._meaning.hidden_size)
        for part in ("train", "heldout"):
            place = self._places.get((part, key))
            if place is not None and self._schemas[place[0]].equals(expected, check_metadata=True):
                return place
        return None

    def __len__(self) -> int:
        """Rows, of all parts."""
        return len(self._places)

    def fetch(self, batch: Batch, spec: TargetSpec) -> SoftTargets:
        """See ``TargetSource``; from the held-out part for ``hidden`` rows that the training part lacks.

        Raises:
            CoverageError: a row that was not recorded.
            PayloadError: a row that is damaged.
            RecordingError: a shard that is gone.
        """
        return SoftTargets.join([self._row(row, spec) for row in batch.rows()])

    def _row(self, row: Batch, spec: TargetSpec) -> SoftTargets:
        key = row_key(row)
        kind = (spec, self._meaning.vocab_size, self._meaning.hidden_size)
        expected = target_schema(*kind)
        if (place := self._place(key, spec)) is not None:
            try:
                batch, metadata = self._reader(place[0]).get_batch_with_custom_metadata(place[1])
            except (OSError, pa.ArrowException) as error:
                raise RecordingError(f"{place[0]} cannot be read any more: {error}") from error
            arrow.check(batch, expected)
            checksum = arrow.checksum(batch, schema_bytes(*kind), arrow.stated({"key": key.hex()}))
            if checksum != metadata[b"checksum"].decode():
                raise PayloadError(f"{place[0]}: row {place[1]} does not agree with its checksum; record it again")
            self.received.setdefault(spec.payload, Received()).add([batch])
            return decode(batch, spec, self._meaning.vocab_size)
        raise CoverageError(
            f"{self._directory} holds {len(self)} rows, and not row {row.inputs[0, :8].tolist()}... of batch {row.number} as"
            f" {spec.payload}; go on recording until it is whole (`kdscale record`), or train with targets.source=live+record"
        )

    def fetch_head(self) -> Head:
        """The teacher's head. Raises: RecordingError."""
        path = self._directory / _HEAD
        try:
            with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
                return decode_head(reader.get_batch(0))
        except (OSError, pa.ArrowException) as error:
            raise RecordingError(f"{path} cannot be read ({error}); record again with `kdscale record`") from error

    def teacher_stats(self) -> list[dict[str, Any]]:
        """No teacher, no counters."""
        return []

    def close(self) -> None:
        self._reader.cache_clear()


def begin(directory: Path, provenance: Provenance) -> None:
    """Make ``directory`` a recording of ``provenance``, or make sure that it is one.

    Raises:
        IdentityError: it holds a recording of something else.
        RecordingError: it cannot be written.
    """
    path = directory / _PROVENANCE
    if path.is_file():
        require_provenance(directory, provenance)
        return
    with _writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _write_json(path, provenance.as_dict())


def save_head(directory: Path, head: Head) -> None:
    """Raises: RecordingError."""
    batch = encode_head(head)
    partial = directory / f".{_HEAD}.partial"
    with _writing(partial):
        with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        partial.rename(directory / _HEAD)


def finish(directory: Path) -> None:
    """Name every file with its sha256: from here on the recording is whole. Raises: RecordingError."""
    hashes = {}
    with _writing(directory / MANIFEST):
        for path in sorted(directory.glob("*.arrow")):
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        _write_json(directory / MANIFEST, {"version": 1, "sha256": hashes})


def require_provenance(directory: Path, expected: Provenance) -> None:
    """Raises: RecordingError when there is none; IdentityError naming every field that differs."""
    path = directory / _PROVENANCE
    try:
        differ = differences(json.loads(path.read_text()), expected.as_dict())
    except (OSError, ValueError, AttributeError) as error:
        raise RecordingError(
            f"{directory} is no recording ({error}); make one with `kdscale record CONFIG {directory}`"
        ) from error
    if differ:
        raise IdentityError(f"{directory} is a recording of something else: {'; '.join(differ)}")


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """A line for every field that differs, by dotted name."""
    then, now = _flat(stored), _flat(wanted)
    return [
        f"{name}: recorded {then.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _shards(directory: Path) -> list[tuple[str, int, Path]]:
    """(name, number, path) of every finished shard, in order."""
    found = [(match, path) for path in directory.glob("*.arrow") if (match := _SHARD.fullmatch(path.name))]
    return sorted((match.group(1), int(match.group(2)), path) for match, path in found)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecordingError(
            f"{path} cannot be written: {error}; finished shards stay good, the same command goes on"
        ) from error


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    write_durably(path, (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode())
