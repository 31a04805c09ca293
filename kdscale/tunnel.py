"""Mutual TLS for a service that itself speaks plainly: torch's rendezvous store, the sequencer's socket.

    client --plain, loopback--> Entrance ==TLS and token, the run's network==> Exit --plain, loopback--> service

Each end carries its connections in one thread of its own. Of what does not know the run's secrets, the service sees nothing.
"""

import asyncio
import contextlib
import hmac
import ipaddress
import os
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any

import psutil

from kdscale import log
from kdscale.credentials import RUN_NAME, Keys
from kdscale.errors import PlacementError

_LOG = log.get(__name__)
_ADMIT_S = 5.0
"""For handshake and token; who connects and says nothing is gone after it."""
_WAITING = 64
"""Most connections that are not admitted yet; one more ends the oldest, so that none of ours waits behind a crowd."""
_TELL_S = 10.0
_CHUNK_BYTES = 64 << 10
_RETRY_S = 0.2
_TRIAL, _THROUGH = b"?", b">"
"""What who is admitted wants: to know that it is, or to reach the service."""
_ADMITTED = b"+"


class _End(ABC):
    """A listener whose connections are carried in a thread."""

    def __init__(self, host: str, port: int) -> None:
        self._listener = listen(host, port)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name=type(self).__name__.lower())
        self._thread.start()

    def _do(self, work: Coroutine[Any, Any, Any], limit_s: float) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(limit_s)

    async def _begin(self) -> None:
        self._listener.setblocking(False)
        self._keep(self._accept())

    def _keep(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self) -> None:
        while True:
            try:
                connection, peer = await self._loop.sock_accept(self._listener)
            except OSError as error:
                # Out of descriptors for now, or a client that has left already.
                _LOG.warning("a connection to %s:%d was not accepted: %s", *self.address, error)
                await asyncio.sleep(_RETRY_S)
                continue
            self._take(connection, peer)

    @abstractmethod
    def _take(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        """Carry a new connection, or refuse it, in a task of its own."""

    def close(self) -> None:
        """End the listener and all connections through it."""
        self._do(self._end(), _ADMIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_ADMIT_S)
        self._loop.close()
        self._listener.close()

    async def _end(self) -> None:
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Exit(_End):
    """Listens at ``host``:``port`` (0: any free one) for who has the run's certificate and token, and carries them to the
    service at ``target`` on loopback."""

    def __init__(self, host: str, port: int, target: tuple[str, int], keys: Keys) -> None:
        self._target = target
        self._token = keys.token.encode()
        self._tls = _context(ssl.PROTOCOL_TLS_SERVER, keys)
        super().__init__(host, port)
        self._waiting: OrderedDict[int, asyncio.Task[None]] = OrderedDict()
        self._refused, self._told = 0, -_TELL_S
        self._do(self._begin(), _ADMIT_S)

    def _take(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        if len(self._waiting) >= _WAITING:
            _, oldest = self._waiting.popitem(last=False)
            oldest.cancel()
        task = self._keep(self._serve(connection, peer))
        self._waiting[id(task)] = task
        task.add_done_callback(lambda done: self._waiting.pop(id(done), None))

    async def _serve(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        inner = None
        try:
            async with asyncio.timeout(_ADMIT_S):
                outer = await _streams(connection, self._tls)
                token = await outer[0].readexactly(len(self._token))
                if not hmac.compare_digest(token, self._token):
                    raise PermissionError("it carries another run's token")
                wish = await outer[0].readexactly(len(_THROUGH))
                if wish == _THROUGH:
                    inner = await asyncio.open_connection(*self._target)
                outer[1].write(_ADMITTED)
                await outer[1].drain()
        except (OSError, EOFError, TimeoutError) as error:
            # ssl.SSLError is an OSError.
            self._refuse(peer, error)
            return
        finally:
            self._waiting.pop(id(asyncio.current_task()), None)
            if inner is None:
                _hang_up(connection)
        if inner is not None:
            await _carry(outer, inner)

    def _refuse(self, peer: tuple[str, int], error: BaseException) -> None:
        self._refused += 1
        # A crowd at the door must not fill the log.
        if time.monotonic() - self._told > _TELL_S:
            self._told = time.monotonic()
            _LOG.warning(
                "a connection from %s:%d to %s:%d was refused (%d so far): %s",
                *(*peer, *self.address, self._refused, _reason(error)),
            )


class Entrance(_End):
    """Listens on loopback for this process alone, and carries what it says to the ``Exit`` at ``target``."""

    def __init__(self, target: tuple[str, int], keys: Keys, limit_s: float) -> None:
        """``limit_s``: how long a connection may take to come about.

        Raises: PlacementError when the other end does not answer within ``limit_s``, or refuses these keys.
        """
        self._target = target
        self._token = keys.token.encode()
        self._limit_s = limit_s
        self._tls = _context(ssl.PROTOCOL_TLS_CLIENT, keys)
        super().__init__("127.0.0.1", 0)
        try:
            self._do(self._try(), limit_s + _ADMIT_S)
            self._do(self._begin(), _ADMIT_S)
        except (OSError, EOFError, TimeoutError) as error:
            self.close()
            raise PlacementError(
                f"{target[0]}:{target[1]} does not let this rank in within {limit_s:g} s: {_reason(error)}; if it runs, the"
                " certificates or the token are another run's or too old"
            ) from error

    async def _try(self) -> None:
        _, writer = await self._dial(_TRIAL)
        writer.close()

    async def _dial(self, wish: bytes) -> "_Streams":
        """Raises: OSError, EOFError, TimeoutError."""
        deadline = time.monotonic() + self._limit_s
        while True:
            try:
                async with asyncio.timeout(max(0.0, min(_ADMIT_S, deadline - time.monotonic()))):
                    return await self._dial_once(wish)
            except (OSError, EOFError, TimeoutError) as error:
                if isinstance(error, ssl.SSLCertVerificationError) or time.monotonic() + _RETRY_S >= deadline:
                    raise
            await asyncio.sleep(_RETRY_S)

    async def _dial_once(self, wish: bytes) -> "_Streams":
        reader, writer = await asyncio.open_connection(*self._target, ssl=self._tls, server_hostname=RUN_NAME)
        try:
            writer.write(self._token + wish)
            await reader.readexactly(len(_ADMITTED))
        except BaseException:
            writer.close()
            raise
        return reader, writer

    def _take(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        self._keep(self._serve(connection, peer))

    async def _serve(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        # Others on this node can reach loopback too, and would be let through with our secrets.
        if not _is_ours(peer):
            _LOG.warning("a connection to %s:%d from another process was refused", *self.address)
            connection.close()
            return
        try:
            outer = await self._dial(_THROUGH)
        except (OSError, EOFError, TimeoutError) as error:
            _LOG.warning("%s:%d does not let this rank in: %s", *self._target, _reason(error))
            connection.close()
            return
        await _carry(await _streams(connection, None), outer)


_Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def require_loopback(host: str) -> None:
    """For a listener without the run's keys. Raises: PlacementError."""
    if not is_loopback(host):
        raise PlacementError(
            f"a listener on {host} has no credentials, and only one on loopback may be plain; hand it those of the run, or"
            " set stream.network to 127.0.0.0/8"
        )


def listen(host: str, port: int) -> socket.socket:
    """Raises: PlacementError when the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise PlacementError(f"cannot listen on {host}:{port}: {error}; free the port or name another one") from error
    return listener


def _context(protocol: int, keys: Keys) -> ssl.SSLContext:
    """TLS 1.3 with the run's certificates alone, of both sides."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=keys.credentials.authority_pem)
    # It takes files only: one in memory, which nobody else can open and which ends here.
    with os.fdopen(os.memfd_create("kdscale"), "w") as file:
        file.write(keys.credentials.certificate_pem + keys.credentials.key_pem)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{file.fileno()}")
    return context


async def _streams(connection: socket.socket, tls: ssl.SSLContext | None) -> _Streams:
    """Of a connection that was accepted, which belongs to them from here on."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(reader)
    transport, _ = await loop.connect_accepted_socket(lambda: protocol, connection, ssl=tls)
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


def _hang_up(connection: socket.socket) -> None:
    """Whoever owns it by now, a half-made transport perhaps, sees its end and closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


async def _carry(one: _Streams, other: _Streams) -> None:
    """Both ways until either side ends."""
    ways = [asyncio.ensure_future(_pour(one[0], other[1])), asyncio.ensure_future(_pour(other[0], one[1]))]
    try:
        await asyncio.gather(*ways)
    finally:
        for way in ways:
            way.cancel()
        for _, writer in (one, other):
            writer.transport.abort()


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    # A connection that is reset has ended, like one that is closed.
    with contextlib.suppress(OSError):
        while chunk := await reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
    # The other way ends with it: neither service knows half of a connection.
    writer.close()


def _is_ours(peer: tuple[str, int]) -> bool:
    """Whether the other end of a connection on loopback lies in this process."""
    # A socket of the newer kind, like torch's, shows the older address in its own form.
    ends = ((one.laddr.ip.removeprefix("::ffff:"), one.laddr.port) for one in psutil.Process().net_connections("tcp"))
    return peer in ends


def _reason(error: BaseException) -> str:
    return str(error) or ("no answer" if isinstance(error, TimeoutError) else repr(error))
