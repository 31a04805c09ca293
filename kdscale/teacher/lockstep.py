"""The sequencer's socket: ranks ring rank 0 when a request arrives, rank 0 tells all ranks the next forward.

No collective is ever used to wait: a rank blocked in one can only time out. Waiting on a socket costs nothing and can be
ended at will. Messages are JSON over ``multiprocessing.connection`` (length-prefixed, HMAC-authenticated, no pickle: only
``send_bytes`` and ``recv_bytes`` are used).
"""

import json
import threading
import time
from dataclasses import asdict
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

from kdscale import log
from kdscale.errors import TeacherError
from kdscale.teacher.sequencer import Forward, Sequencer

_LOG = log.get(__name__)
# A burst of requests arrives within this time; forwards dealt after it hold all of them.
_LINGER_S = 0.02


class LockstepServer:
    """Rank 0's side: one thread that owns the sequencer and the connections of all ranks (its own included)."""

    def __init__(self, host: str, token: str, ranks: int, sequencer: Sequencer) -> None:
        self._listener = Listener((host, 0), authkey=token.encode(), backlog=ranks)
        self.address: tuple[str, int] = self._listener.address  # type: ignore[assignment]
        self._ranks = ranks
        self._sequencer = sequencer
        self._stopping = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="sequencer").start()

    def stop(self) -> None:
        """Tell every rank that no forward follows the one in progress."""
        self._stopping.set()

    def _run(self) -> None:
        connections: dict[int, Connection] = {}
        while len(connections) < self._ranks:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, OSError) as error:
                _LOG.warning("sequencer refused a connection: %r", error)
                continue
            connections[json.loads(connection.recv_bytes())["rank"]] = connection
        self._listener.close()
        busy: set[int] = set()
        rank_of = {id(connection): rank for rank, connection in connections.items()}
        try:
            while not self._stopping.is_set():
                for ready in wait(list(connections.values()), timeout=0.2):
                    assert isinstance(ready, Connection)
                    self._take(rank_of[id(ready)], json.loads(ready.recv_bytes()), busy)
                if busy or not self._sequencer.waiting:
                    continue
                deadline = time.monotonic() + _LINGER_S
                while (left := deadline - time.monotonic()) > 0:
                    for ready in wait(list(connections.values()), timeout=left):
                        assert isinstance(ready, Connection)
                        self._take(rank_of[id(ready)], json.loads(ready.recv_bytes()), busy)
                forward = self._sequencer.next_forward()
                assert forward is not None
                busy.update(connections)
                for connection in connections.values():
                    connection.send_bytes(json.dumps(asdict(forward)).encode())
        except (EOFError, OSError) as error:
            _LOG.error("sequencer lost a rank: %r", error)
        finally:
            for connection in connections.values():
                connection.close()

    def _take(self, rank: int, message: dict[str, Any], busy: set[int]) -> None:
        if "done" in message:
            busy.discard(rank)
        else:
            self._sequencer.ring(rank, message["request"], message["tokens"])


class LockstepClient:
    """One rank's side. ``ring`` may be called from any thread, ``next_forward`` and ``done`` from the forward's own."""

    def __init__(self, address: tuple[str, int], token: str, rank: int) -> None:
        self._connection = Client(address, authkey=token.encode())
        self._lock = threading.Lock()
        self._send({"rank": rank})

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            try:
                self._connection.send_bytes(json.dumps(message).encode())
            except OSError as error:
                raise TeacherError(f"the sequencer on rank 0 is gone: {error}") from error

    def ring(self, request: int, tokens: int) -> None:
        self._send({"request": request, "tokens": tokens})

    def done(self, forward: Forward) -> None:
        self._send({"done": forward.number})

    def next_forward(self) -> Forward | None:
        """Block until the next forward; none when the sequencer has closed."""
        try:
            fields = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            return None
        return Forward(fields["number"], tuple(tuple(share) for share in fields["shares"]))
