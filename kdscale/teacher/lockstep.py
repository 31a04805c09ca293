"""The sequencer's socket: ranks ring rank 0 when a request arrives, rank 0 tells all ranks the next forward.

No collective is ever used to wait: a rank blocked in one can only time out. Waiting on a socket costs nothing and can be
ended at will. Messages are JSON over ``multiprocessing.connection`` (length-prefixed, HMAC-authenticated, no pickle: only
``send_bytes`` and ``recv_bytes`` are used), inside mutual TLS where the run has certificates.
"""

import contextlib
import json
import os
import queue
import socket
import struct
import threading
import time
from dataclasses import asdict
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge, wait
from typing import Any

from kdscale import log, tunnel
from kdscale.credentials import Keys
from kdscale.errors import TeacherError
from kdscale.teacher.sequencer import Forward, Sequencer

_LOG = log.get(__name__)
# A burst of requests arrives within this time; forwards dealt after it hold all of them.
_LINGER_S = 0.02
_POLL_S = 0.2
_GREET_S = 5.0
_LONGEST_GREETING = 1024
_REACH_S = 20.0


class LockstepServer:
    """Rank 0's side: one thread that owns the sequencer and the connections of all ranks (its own included)."""

    def __init__(
        self,
        host: str,
        token: str,
        ranks: int,
        sequencer: Sequencer,
        keys: Keys | None = None,
        greet_s: float = _GREET_S,
    ) -> None:
        """Plain without ``keys``. Raises: PlacementError when that would be off loopback."""
        if keys is None:
            tunnel.require_loopback(host)
        self._listener = tunnel.listen(host if keys is None else "127.0.0.1", 0)
        self._listener.settimeout(_POLL_S)
        self.address: tuple[str, int] = self._listener.getsockname()
        if keys is not None:
            self._door = tunnel.Exit(host, 0, self.address, keys)
            self.address = self._door.address
        self._token = token.encode()
        self._ranks = ranks
        self._sequencer = sequencer
        self._greet_s = greet_s
        self._stopping = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="sequencer").start()

    def stop(self) -> None:
        """Tell every rank that no forward follows the one in progress."""
        self._stopping.set()

    def _connections(self) -> dict[int, Connection]:
        """One of each rank. Who knocks is greeted in a thread of its own: a stranger that says nothing keeps nobody."""
        greeted: queue.SimpleQueue[tuple[int, Connection]] = queue.SimpleQueue()
        connections: dict[int, Connection] = {}
        while len(connections) < self._ranks and not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                knocking, _ = self._listener.accept()
                threading.Thread(target=self._greet, args=(knocking, greeted), daemon=True, name="greeting").start()
            while not greeted.empty():
                rank, connection = greeted.get()
                connections[rank] = connection
        self._listener.close()
        return connections

    def _greet(self, knocking: socket.socket, greeted: "queue.SimpleQueue[tuple[int, Connection]]") -> None:
        limit = struct.pack("ll", int(self._greet_s), int(self._greet_s % 1 * 1e6))
        knocking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        connection = Connection(os.dup(knocking.fileno()))
        try:
            deliver_challenge(connection, self._token)
            answer_challenge(connection, self._token)
            rank = json.loads(connection.recv_bytes(_LONGEST_GREETING))["rank"]
            if rank not in range(self._ranks):
                raise ValueError(f"rank {rank!r} of {self._ranks}")
        except (AuthenticationError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
            _LOG.warning("sequencer refused a connection: %r", error)
            connection.close()
            return
        finally:
            knocking.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
            knocking.close()
        greeted.put((rank, connection))

    def _run(self) -> None:
        connections = self._connections()
        busy: set[int] = set()
        rank_of = {id(connection): rank for rank, connection in connections.items()}
        try:
            while not self._stopping.is_set():
                for ready in wait(list(connections.values()), timeout=0.2):
                    assert isinstance(ready, Connection)
                    self._take(rank_of[id(ready)], json.loads(ready.recv_bytes()), busy)
                if busy or not self._sequencer.waiting:
                    continue
                # What a forward of one request holds does not depend on what else arrives.
                deadline = time.monotonic() + (0.0 if self._sequencer.one_request else _LINGER_S)
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
            self._sequencer.ring(rank, message["request"], message["rows"], message["columns"])


class LockstepClient:
    """One rank's side. ``ring`` may be called from any thread, ``next_forward`` and ``done`` from the forward's own."""

    def __init__(self, address: tuple[str, int], token: str, rank: int, keys: Keys | None = None) -> None:
        """Raises: PlacementError when the sequencer does not take ``keys``."""
        if keys is not None:
            self._door = tunnel.Entrance(address, keys, _REACH_S)
            address = self._door.address
        self._connection = Client(address, authkey=token.encode())
        self._lock = threading.Lock()
        self._send({"rank": rank})

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock:
            try:
                self._connection.send_bytes(json.dumps(message).encode())
            except OSError as error:
                raise TeacherError(f"the sequencer on rank 0 is gone: {error}") from error

    def ring(self, request: int, rows: int, columns: int) -> None:
        self._send({"request": request, "rows": rows, "columns": columns})

    def done(self, forward: Forward) -> None:
        self._send({"done": forward.number})

    def next_forward(self) -> Forward | None:
        """Block until the next forward; none when the sequencer has closed."""
        try:
            fields = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            return None
        return Forward(fields["number"], tuple(tuple(share) for share in fields["shares"]))
