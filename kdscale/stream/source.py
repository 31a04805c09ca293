"""The contract of every source of soft targets, live or recorded."""

import threading
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyarrow as pa

from kdscale.batch import Batch, SoftTargets
from kdscale.errors import CoverageError
from kdscale.head import Head
from kdscale.spec import TargetSpec


@dataclass
class Received:
    """Bytes and positions that answers held. Safe to add to from several threads."""

    bytes: int = 0
    tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, parts: list[pa.RecordBatch]) -> None:
        size, tokens = sum(part.nbytes for part in parts), sum(part.num_rows for part in parts)
        with self._lock:
            self.bytes += size
            self.tokens += tokens

    def as_dict(self) -> dict[str, int]:
        return {"bytes": self.bytes, "tokens": self.tokens}


class TargetSource(Protocol):
    """Gives the soft targets of a batch: a pure function of (teacher, tokens, spec), so it may be asked again."""

    def fetch(self, batch: Batch, spec: TargetSpec) -> SoftTargets:
        """The targets of the batch's trained positions, in row-major order.

        Raises:
            StreamError: no endpoint could serve the request in time.
            IdentityError: the endpoint serves another teacher.
            CoverageError: the recording lacks a row.
        """
        ...


class TeacherSource(TargetSource, Protocol):
    """A source that stands for a whole teacher."""

    @property
    def received(self) -> dict[str, Received]:
        """What answers amounted to, by payload."""
        ...

    def fetch_head(self) -> Head:
        """The teacher's head (weight, bias, softcap, scale)."""
        ...

    def teacher_stats(self) -> list[dict[str, Any]]:
        """Counters of every live rank; empty where no teacher runs."""
        ...

    def close(self) -> None: ...


class NoTargets:
    """Stands for the teacher of a run that has none (``targets.source: none``)."""

    def __init__(self) -> None:
        self.received: dict[str, Received] = {}

    def fetch(self, batch: Batch, spec: TargetSpec) -> SoftTargets:
        """Raises: CoverageError."""
        raise CoverageError(f"batch {batch.number}: targets.source = none has no {spec.payload} targets")

    def fetch_head(self) -> Head:
        """Raises: CoverageError."""
        raise CoverageError("targets.source = none: there is no teacher whose head could be fetched")

    def teacher_stats(self) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        """Nothing is open."""
