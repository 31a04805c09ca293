"""Cancels reads that stand still."""

import threading
import time

import pyarrow.flight as fl


class Watch:
    """One read that is being watched."""

    def __init__(self, reader: fl.FlightStreamReader) -> None:
        self.reader = reader
        self.fired = False
        self.progress()

    def progress(self) -> None:
        self.seen = time.monotonic()


class Watchdog:
    """Cancels reads that make no progress; gRPC's own keep-alive would take a minute and harm idle streams."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._watches: set[Watch] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="stall-watchdog").start()

    def watch(self, reader: fl.FlightStreamReader) -> Watch:
        watch = Watch(reader)
        self._watches.add(watch)
        return watch

    def forget(self, watch: Watch) -> None:
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
