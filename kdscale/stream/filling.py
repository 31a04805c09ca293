"""A live teacher whose answers are kept: each row is asked for once, and once all are there no teacher is needed."""

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from kdscale.batch import Batch, SoftTargets
from kdscale.errors import StreamError
from kdscale.head import Head
from kdscale.spec import TargetSpec
from kdscale.stream.client import FlightSource
from kdscale.stream.protocol import Meaning
from kdscale.stream.recording import Provenance, Recording, RecordingWriter, row_key, save_head
from kdscale.stream.source import Received
from kdscale.targets.decode import decode


class Filling:
    """A ``TeacherSource`` of one rank: rows from the recording where it has them, else from the teacher, whose answers it adds
    to the recording in shards of its own. Safe to call from several threads.

    Raises: what ``Recording`` and ``FlightSource`` raise.
    """

    def __init__(
        self,
        live: FlightSource,
        directory: Path,
        provenance: Provenance,
        *,
        meaning: Meaning,
        row_tokens: int,
        heldout: TargetSpec,
        rank: int,
    ) -> None:
        """``heldout``: what is asked for of held-out rows; other requests than this and the training's are not kept."""
        self._live, self._directory, self._meaning = live, directory, meaning
        self._recording = Recording(directory, provenance)
        self._writers = {
            spec: RecordingWriter(directory, f"{name}-r{rank}", spec, meaning, row_tokens)
            for name, spec in (("heldout", heldout), ("train", provenance.targets))
        }
        self._written: set[tuple[TargetSpec, bytes]] = set()
        self._closed = False
        self._asking = 0
        self._changed = threading.Condition()
        self._stats: list[dict[str, Any]] | None = None
        self.received: dict[str, Received] = live.received

    def fetch(self, batch: Batch, spec: TargetSpec) -> SoftTargets:
        if spec not in self._writers:
            return self._live.fetch(batch, spec)
        if self._holds(batch, spec):
            return self._recording.fetch(batch, spec)
        # In deterministic mode a row's targets must depend on nothing else.
        asked = batch.rows() if self._live.by_row else [batch]
        return SoftTargets.join([self._ask(one, spec) for one in asked])

    def _holds(self, batch: Batch, spec: TargetSpec) -> bool:
        return all(self._recording.holds(row, spec) for row in batch.rows())

    def _ask(self, batch: Batch, spec: TargetSpec) -> SoftTargets:
        with self._changed:
            asks = self._stats is None
            self._asking += asks
        if not asks:
            # The teacher was let go since the recording was looked at; it has all rows by now, of other ranks too.
            if self._holds(batch, spec):
                return self._recording.fetch(batch, spec)
            raise StreamError(f"batch {batch.number} has rows that were not recorded, and the teacher was let go")
        try:
            parts = self._live.fetch_batches(batch, spec)
            targets = SoftTargets.join([decode(part, spec, self._meaning.vocab_size) for part in parts])
            with self._changed:
                self.received.setdefault(spec.payload, Received()).add(parts)
                if not self._closed:
                    self._keep(batch, spec, pa.concat_batches(parts))
            return targets
        finally:
            with self._changed:
                self._asking -= 1
                self._changed.notify_all()

    def _keep(self, batch: Batch, spec: TargetSpec, answer: pa.RecordBatch) -> None:
        start = 0
        for row in batch.rows():
            key, positions = row_key(row), row.num_tokens
            if (spec, key) not in self._written and not self._recording.holds(row, spec):
                self._writers[spec].add(key, [answer.slice(start, positions)])
                self._written.add((spec, key))
            start += positions

    # ---- the end of the teacher ----

    def flush(self) -> None:
        """Finish this rank's shards in progress, so that every rank can read them. Raises: RecordingError."""
        with self._changed:
            for writer in self._writers.values():
                writer.flush()

    def lacks(self, rows: Iterable[tuple[Batch, TargetSpec]]) -> int:
        """How many of ``rows`` no finished shard of any rank holds."""
        self._recording.refresh()
        return sum(not self._recording.holds(row, spec) for row, spec in rows)

    def let_go(self, limit_s: float) -> None:
        """Ask nothing more of the teacher, and wait for what has been asked. All rows must be recorded.

        Raises: StreamError when an answer is not there within ``limit_s``.
        """
        stats = self._live.teacher_stats()
        self._recording.refresh()
        with self._changed:
            self._stats = stats
            if not self._changed.wait_for(lambda: self._asking == 0, limit_s):
                raise StreamError(
                    f"{self._asking} requests were not answered within {limit_s:g} s of the first epoch's end"
                )

    def fetch_head(self) -> Head:
        return self._live.fetch_head()

    def save_head(self, head: Head) -> None:
        """Raises: RecordingError."""
        save_head(self._directory, head)

    def teacher_stats(self) -> list[dict[str, Any]]:
        return self._live.teacher_stats() if self._stats is None else self._stats

    def close(self) -> None:
        """Keep what has arrived; what comes later is lost, as its shard would never be finished."""
        with self._changed:
            self._closed = True
        self.flush()
        self._live.close()
        self._recording.close()
