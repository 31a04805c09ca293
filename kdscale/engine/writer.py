"""One rank's share of one checkpoint, written by a thread of its own; rank 0's also makes the checkpoint exist.

No rank waits for another in a collective here. A rank whose files are synced leaves a small file that lists them, by a
rename; rank 0 writes the manifest when every rank's list is there, reads everything back, and publishes. A rank that
fails leaves no list, so nothing is published; the ranks agree on that when they next meet (see ``saver``).
"""

import json
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.serialization import config as serialization

from kdscale.durable import SealedFile, replace, require_space, seal, sync_directory, write_durably
from kdscale.engine.capture import Captured
from kdscale.engine.manifest import MANIFEST, Content, Entry, Layout, render, verify
from kdscale.engine.staging import publish
from kdscale.errors import CheckpointError

_POLL_S = 0.02
_SLACK_BYTES = 1 << 20
"""Of each rank, for the manifest, directories and archive headers."""


@dataclass(frozen=True)
class Ticket:
    """What one checkpoint is, to every rank."""

    step: int
    staging: Path
    final: Path
    layout: Layout
    identity: dict[str, Any]
    notes: dict[str, Any]
    environment: dict[str, str]
    num_bytes: int
    """Of all ranks."""
    keep: int
    key: bytes | None
    """On rank 0."""


class Writer:
    """Writes in the background from the moment it is made."""

    def __init__(self, ticket: Ticket, rank: int, captured: Captured, small: dict[str, bytes]) -> None:
        """``captured`` is emptied as it is written. ``small`` are further files by path inside the checkpoint."""
        self.ticket, self._rank = ticket, rank
        self._captured, self._small = captured, small
        self._given_up = threading.Event()
        self.fault: Exception | None = None
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"checkpoint-{ticket.step}")
        self._thread.start()

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def give_up(self) -> None:
        """Leave the rest unwritten; nothing is published from here on, unless that has begun."""
        self._given_up.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; whether it came."""
        self._thread.join(timeout_s)
        return self.ended

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self._write()
            if self._rank == 0:
                self._publish()
        except Exception as error:  # noqa: BLE001 - kept for the ranks to agree on; a thread has nobody to raise to
            self.fault = error
        finally:
            self._captured.files.clear()
            self.seconds = time.monotonic() - began

    def _write(self) -> None:
        ticket, captured = self.ticket, self._captured
        if captured.fault is not None:
            raise captured.fault
        ticket.staging.mkdir(parents=True, exist_ok=True)
        require_space(ticket.staging, ticket.num_bytes + ticket.layout.world * _SLACK_BYTES)
        entries: dict[str, Entry] = {}
        for name, data in self._small.items():
            entries[name] = self._file(name, data)
        while captured.files:
            # Its memory is free again while the next is written.
            name, state = captured.files.popitem()
            entries[name] = self._file(name, state)
            del state
        for directory in {(ticket.staging / name).parent for name in entries}:
            sync_directory(directory)
        listed = {name: asdict(entry) for name, entry in entries.items()}
        replace(ticket.staging / _list_file(self._rank), json.dumps(listed).encode())

    def _file(self, name: str, content: Any) -> Entry:
        """Write bytes as they are, and anything else as torch's archive."""
        path = self.ticket.staging / name
        path.parent.mkdir(exist_ok=True)
        file = SealedFile(path, seal(self.ticket.step, self._rank, name), self._given_up.is_set)
        try:
            if isinstance(content, bytes):
                file.write(content)
            else:
                # The sha256 says more than the archive's own checksum, which takes longer.
                with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]
                    torch.save(content, file)  # type: ignore[arg-type]
        finally:
            digest = file.close()
        return Entry(self._rank, file.num_bytes, digest)

    def _publish(self) -> None:
        ticket = self.ticket
        files: dict[str, Entry] = {}
        for rank in range(ticket.layout.world):
            path = ticket.staging / _list_file(rank)
            self._wait_for(path)
            files |= {name: Entry(**entry) for name, entry in json.loads(path.read_text()).items()}
            path.unlink()
        content = Content(ticket.step, ticket.layout, ticket.identity, ticket.notes, ticket.environment, files)
        assert ticket.key is not None
        write_durably(ticket.staging / MANIFEST, render(content, ticket.key))
        # Only what can be read back takes the place of an older one.
        verify(ticket.staging, ticket.key)
        if self._given_up.is_set():
            raise CheckpointError("given up before it was published")
        publish(ticket.staging, ticket.final, ticket.keep)

    def _wait_for(self, path: Path) -> None:
        # By listing: some shared file systems remember for a while that a name was not there.
        while path.name not in {one.name for one in path.parent.iterdir()}:
            if self._given_up.wait(_POLL_S):
                raise CheckpointError("another rank's files did not come")


def _list_file(rank: int) -> str:
    return f"rank-{rank}.json"
