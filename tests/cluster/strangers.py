"""Strangers at the doors of a run, from another host: ``python -m tests.cluster.strangers ACCESS HOST:PORT...``.

Of the ports, those are doors of the run that open for its own keys; the others are Ray's, and what collectives of one group
listen on. At each door: a plain connection, one over TLS without a certificate, one with a certificate of another run, one
with the right certificate and another token, and a crowd that says nothing. Prints what was tried, and who was let in.
"""

import contextlib
import json
import socket
import ssl
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pyarrow.flight as fl

from kdscale import tunnel
from kdscale.cluster.security import Authority
from kdscale.credentials import RUN_NAME, Credentials, Keys
from kdscale.errors import StreamError
from kdscale.stream.protocol import Access, call, connect

CROWD = 100
"""Silent connections a door."""
_WAIT_S = 2.0
# What a client of HTTP/2, thus of gRPC, says first; a server that talks to it answers with its settings.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

Door = tuple[str, int]


def answer(door: Door, says: bytes, tls: ssl.SSLContext | None) -> bytes:
    """What is said back to ``says``; nothing when there is no answer, or none is wanted."""
    with ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(door, _WAIT_S))
        with contextlib.suppress(OSError):
            if tls is not None:
                connection = stack.enter_context(tls.wrap_socket(connection, server_hostname=RUN_NAME))
            connection.settimeout(_WAIT_S)
            connection.sendall(says)
            return connection.recv(64)
    return b""


def context(credentials: Credentials | None) -> ssl.SSLContext:
    """Of a client that does not care whom it talks to; ours does."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if credentials is not None:
        tls = tunnel._context(ssl.PROTOCOL_TLS_CLIENT, Keys(credentials, ""))
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    tls.set_alpn_protocols(["h2"])
    return tls


def speaks_flight(door: Door, access: Access) -> bool:
    return bool(answer(door, _PREFACE, context(access.credentials)))


def takes_our_token(door: Door, access: Access) -> bool:
    """As the doors before services without TLS of their own do."""
    says = access.token.encode() + tunnel._TRIAL
    return answer(door, says, context(access.credentials)) == tunnel._ADMITTED


def other_token_opens_flight(door: Door, access: Access) -> bool:
    with connect(f"{door[0]}:{door[1]}", access.credentials) as client:
        try:
            call(client, "stats", "0" * len(access.token), 10)
        except (fl.FlightUnauthenticatedError, StreamError):
            return False
    return True


def main() -> None:
    access = Access.load(Path(sys.argv[1]))
    assert access.credentials is not None
    ports = [(host, int(port)) for host, _, port in (one.rpartition(":") for one in sys.argv[2:])]
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(32))

        def those(opens: Callable[[Door], bool], doors: list[Door]) -> list[Door]:
            return [door for door, opened in zip(doors, pool.map(opens, doors), strict=True) if opened]

        flight = those(lambda door: speaks_flight(door, access), ports)
        tunnels = those(lambda door: takes_our_token(door, access), [door for door in ports if door not in flight])
        for door in [*flight, *tunnels]:
            for _ in range(CROWD):
                stack.enter_context(socket.create_connection(door, _WAIT_S))
        says = dict.fromkeys(flight, _PREFACE) | dict.fromkeys(tunnels, access.token.encode() + tunnel._TRIAL)
        foreign, ours = context(Authority().issue()), context(access.credentials)
        knocks: dict[str, Callable[[Door], bool]] = {
            "plain": lambda door: bool(answer(door, says[door], None)),
            "no certificate": lambda door: bool(answer(door, says[door], context(None))),
            "another run's certificate": lambda door: bool(answer(door, says[door], foreign)),
        }
        let_in = [(name, door) for name, knock in knocks.items() for door in those(knock, [*says])]
        let_in += [
            ("another token", door) for door in those(lambda door: other_token_opens_flight(door, access), flight)
        ]
        other = b"0" * len(access.token) + tunnel._TRIAL
        let_in += [("another token", door) for door in those(lambda door: bool(answer(door, other, ours)), tunnels)]
        # The crowd stays for a while: meanwhile the run goes on.
        time.sleep(_WAIT_S)
    print(json.dumps({"flight": len(flight), "tunnels": len(tunnels), "ports": len(ports), "let_in": let_in}))


if __name__ == "__main__":
    main()
