"""Scores a corpus once and leaves the answers on disk, for any number of runs without a teacher."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pyarrow as pa

from kdscale.batch import Batch
from kdscale.config.schema import RunConfig
from kdscale.data.reading import RunCorpus, make_loader
from kdscale.evaluate.quality import HIDDEN
from kdscale.spec import TargetSpec
from kdscale.stream.client import FlightSource
from kdscale.stream.protocol import Access, Meaning
from kdscale.stream.recording import (
    Provenance,
    Recording,
    RecordingWriter,
    begin,
    finish,
    row_key,
    save_head,
)

_TICK_S = 1.0


class Recorder:
    """Fills ``directory`` with the targets of every training row, in the order of the first epoch, and with what held-out
    quality needs.

    Raises:
        IdentityError: the directory holds a recording of something else.
        RecordingError: it cannot be written.
    """

    def __init__(self, config: RunConfig, meaning: Meaning, corpus: RunCorpus, directory: Path) -> None:
        self._config, self._meaning, self._directory = config, meaning, directory
        provenance = Provenance.of(config, meaning, corpus.fingerprint)
        begin(directory, provenance)
        self._done = Recording(directory, provenance)
        self._train = make_loader(corpus.train, config.data, config.train.batch_rows, config.run.seed)
        self._heldout = make_loader(corpus.heldout, config.data, 1, config.run.seed)

    def run(self, access: Access, tick: Callable[[int, int], None], stop: threading.Event) -> bool:
        """Ask for what is missing and write it; ``tick(done, total)`` is called about once a second.

        Returns whether the recording is whole; it is not when ``stop`` was set.

        Raises:
            StreamError, IdentityError: what the teacher's endpoints say.
            RecordingError: the disk is full, for instance.
        """
        config = self._config
        rows = self._train.num_rows
        with closing(FlightSource(access, self._meaning, config.stream, "recorder")) as source:
            save_head(self._directory, source.fetch_head())
            whole = self._part("heldout", self._heldout_rows(), HIDDEN, source, lambda done: None, stop) and self._part(
                "train", self._training_rows(), config.target_spec(0), source, lambda done: tick(done, rows), stop
            )
        if whole:
            finish(self._directory)
            tick(rows, rows)
        return whole

    def _training_rows(self) -> Iterator[Batch]:
        """Each row once, with the batch number it first has in training: samples are drawn by that."""
        left, number = self._train.num_rows, 0
        while left > 0:
            rows = [row.asked for row in self._train.batch(number).rows()]
            yield from rows[:left]
            left, number = left - len(rows), number + 1

    def _heldout_rows(self) -> Iterator[Batch]:
        if self._config.evaluate.quality:
            tokens = self._config.data.heldout_tokens
            yield from (row.asked for row in self._heldout.heldout_batches(tokens, rows_per_batch=1))

    def _part(
        self,
        name: str,
        rows: Iterator[Batch],
        spec: TargetSpec,
        source: FlightSource,
        tick: Callable[[int], None],
        stop: threading.Event,
    ) -> bool:
        """Requests stay in flight ahead of the row that is written; rows are written in their order."""
        writer = RecordingWriter(self._directory, name, spec, self._meaning, self._config.data.row_tokens)
        # A request is one row: as many rows in flight as a student of this config would have.
        ahead = self._config.stream.in_flight * self._config.train.micro_rows
        window: deque[tuple[Batch, Future[list[pa.RecordBatch]]]] = deque()
        done, said = 0, float("-inf")
        with ThreadPoolExecutor(ahead, thread_name_prefix="record") as pool:
            try:
                for row in rows:
                    if (name, row) in self._done:
                        done += 1
                        continue
                    window.append((row, pool.submit(source.fetch_batches, row, spec)))
                    if len(window) == ahead:
                        done += self._write(writer, *window.popleft())
                    if time.monotonic() - said >= _TICK_S:
                        said = time.monotonic()
                        tick(done)
                    if stop.is_set():
                        return False
                for entry in window:
                    done += self._write(writer, *entry)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        writer.flush()
        return True

    @staticmethod
    def _write(writer: RecordingWriter, row: Batch, answer: "Future[list[pa.RecordBatch]]") -> int:
        writer.add(row_key(row), answer.result())
        return 1
