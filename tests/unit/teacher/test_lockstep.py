"""The sequencer's socket: ranks in lockstep, plainly and over TLS, and strangers who come first."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client

import pytest

from kdscale.cluster.security import Authority
from kdscale.credentials import Keys
from kdscale.errors import PlacementError
from kdscale.teacher.lockstep import LockstepClient, LockstepServer
from kdscale.teacher.sequencer import Forward, Sequencer

TOKEN = "t" * 64


def play(connect: Callable[[int], LockstepClient], server: LockstepServer) -> None:
    """Two ranks get the same forwards, whichever of them rings, until the server stops."""
    seen: list[list[Forward]] = [[], []]
    clients = [connect(rank) for rank in range(2)]

    def follow(rank: int) -> None:
        while (forward := clients[rank].next_forward()) is not None:
            seen[rank].append(forward)
            clients[rank].done(forward)

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for number in range(3):
        clients[number % 2].ring(number, 2, 5)
        deadline = time.monotonic() + 10
        while len(seen[0]) <= number or len(seen[1]) <= number:
            assert time.monotonic() < deadline, seen
            time.sleep(0.01)
    server.stop()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert seen[0] == seen[1]
    assert [forward.shares for forward in seen[0]] == [((0,), ()), ((), (1,)), ((2,), ())]


def test_strangers_before_the_ranks_keep_nobody(caplog: pytest.LogCaptureFixture):
    """One that says nothing, one with another token, one that is no rank."""
    server = LockstepServer("127.0.0.1", TOKEN, 2, Sequencer(2, 64), greet_s=3.0)
    silent = socket.create_connection(server.address)
    with pytest.raises(Exception, match="digest sent was rejected"):
        Client(server.address, authkey=b"u" * 64)
    with Client(server.address, authkey=TOKEN.encode()) as odd:
        odd.send_bytes(b'{"rank": 2}')
        assert odd.poll(10)
        with pytest.raises(EOFError):
            odd.recv_bytes()
    play(lambda rank: LockstepClient(server.address, TOKEN, rank), server)
    silent.settimeout(10)
    while silent.recv(100):
        pass
    assert "rank 2 of 2" in caplog.text


def test_over_tls():
    authority = Authority()
    server = LockstepServer("127.0.0.1", TOKEN, 2, Sequencer(2, 64), Keys(authority.issue(), TOKEN))
    with socket.create_connection(server.address) as plain:
        plain.sendall(b"plainly, longer than any handshake begins")
        with contextlib.suppress(ConnectionResetError):
            assert b"CHALLENGE" not in plain.recv(100)
    play(lambda rank: LockstepClient(server.address, TOKEN, rank, Keys(authority.issue(), TOKEN)), server)


def test_plain_stays_on_loopback():
    with pytest.raises(PlacementError, match=r"a listener on 10\.0\.0\.1 has no credentials"):
        LockstepServer("10.0.0.1", TOKEN, 2, Sequencer(2, 64))
