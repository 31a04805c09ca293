"""Keeps requests in flight ahead of the trainer and hands results over in batch order."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from kdscale.batch import Batch, SoftTargets
from kdscale.errors import CoverageError, StreamError
from kdscale.spec import TargetSpec
from kdscale.stream.source import TargetSource


@dataclass(frozen=True)
class Fetched:
    """A batch with the targets of what was asked of it, and how long the trainer stood waiting for them."""

    batch: Batch
    targets: SoftTargets
    waited_s: float


Request = tuple[Batch | Callable[[], Batch], TargetSpec]
"""A batch, or what gives one; a thread of the window's waits for it. Threads take them in order, so that one may wait for what
comes of those before it."""


class Prefetcher:
    """A window of at most ``in_flight`` requests, refilled when half of it is used.

    Refilling by halves sends requests in bursts, so that a teacher that is faster than the student still scores
    several of them in one forward on every rank, instead of one at a time on one rank. The window is the back-pressure:
    nothing is asked for beyond it.
    """

    def __init__(self, source: TargetSource, requests: Iterator[Request], in_flight: int) -> None:
        self._source = source
        self._requests = requests
        self._in_flight = in_flight
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="prefetch")
        self._window: deque[Future[tuple[Batch, SoftTargets]]] = deque()
        self._closed = threading.Event()
        self._fill()

    def _fill(self) -> None:
        while len(self._window) < self._in_flight and not self._closed.is_set():
            request = next(self._requests, None)
            if request is None:
                return
            self._window.append(self._pool.submit(self._fetch, *request))

    def _fetch(self, batch: Batch | Callable[[], Batch], spec: TargetSpec) -> tuple[Batch, SoftTargets]:
        batch = batch() if callable(batch) else batch
        return batch, self._source.fetch(batch.asked, spec)

    def next(self) -> Fetched:
        """The next batch with its targets.

        Raises:
            StopIteration: the batches are used up.
            StreamError, IdentityError, OnPolicyError: what the fetch, or the batch, raised.
            PayloadError, CoverageError: the targets are not those of this batch's labels.
        """
        if not self._window:
            raise StopIteration
        future = self._window.popleft()
        start = time.monotonic()
        batch, targets = future.result()
        waited_s = time.monotonic() - start
        if len(self._window) <= self._in_flight // 2:
            self._fill()  # before the trainer goes on, so that its whole step is time for the teacher
        check_alignment(batch.asked, targets)
        return Fetched(batch, targets, waited_s)

    def settle(self) -> None:
        """Refill the window and wait until nothing is in flight. Raises: what a fetch raised."""
        self._fill()
        for future in self._window:
            future.result()

    def close(self) -> None:
        """Forget what is still in flight. Waits for no answer."""
        self._closed.set()
        self._window.clear()
        self._pool.shutdown(wait=False, cancel_futures=True)


def check_alignment(batch: Batch, targets: SoftTargets) -> None:
    """Every trained token has a target, and each target says it predicts the token the student trains on.

    Raises:
        CoverageError: fewer or more targets than trained positions.
        StreamError: a target predicts another token than the label.
    """
    labels = batch.labels()
    if len(targets) != len(labels):
        raise CoverageError(
            f"batch {batch.number} trains on {len(labels)} tokens and got targets for {len(targets)}; every trained"
            " token must have one"
        )
    wrong = (targets.labels_T.numpy() != labels).nonzero()[0]
    if len(wrong):
        first = int(wrong[0])
        raise StreamError(
            f"batch {batch.number}: {len(wrong)} of {len(labels)} targets predict another token than the student's label"
            f" (first at trained position {first}: teacher {int(targets.labels_T[first])}, student {int(labels[first])});"
            " teacher and student read the rows differently"
        )
