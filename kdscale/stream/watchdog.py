"""Cancels reads that stand still, or whose endpoint is gone."""

import threading
import time

import pyarrow.flight as fl

from kdscale.stream.directory import Listing
from kdscale.stream.protocol import Endpoint


class Watch:
    """One read that is being watched."""

    def __init__(self, reader: fl.FlightStreamReader, endpoint: Endpoint) -> None:
        self.reader = reader
        self.endpoint = endpoint
        self.cancelled_for: str | None = None
        """Why it was cancelled."""
        self.progress()

    def progress(self) -> None:
        self.seen = time.monotonic()

    def cancel(self, reason: str) -> None:
        if self.cancelled_for is None:
            self.cancelled_for = reason
            self.reader.cancel()


class Watchdog:
    """Cancels reads that make no progress; gRPC's own keep-alive would take a minute and harm idle streams."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._watches: set[Watch] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="stall-watchdog").start()

    def watch(self, reader: fl.FlightStreamReader, endpoint: Endpoint) -> Watch:
        watch = Watch(reader, endpoint)
        self._watches.add(watch)
        return watch

    def forget(self, watch: Watch) -> None:
        self._watches.discard(watch)

    def follow(self, listing: Listing) -> None:
        """Cancel what is read from replicas that are gone; those that leave finish what they have been asked."""
        listed = set(listing.endpoints)
        for watch in list(self._watches):
            if watch.endpoint not in listed and watch.endpoint.replica not in listing.leaving:
                watch.cancel("its replica is gone from the directory")

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(min(1.0, self._limit_s / 10)):
            now = time.monotonic()
            for watch in list(self._watches):
                if now - watch.seen >= self._limit_s:
                    watch.cancel(f"no progress for {self._limit_s:g} s (stream.stall_seconds)")
