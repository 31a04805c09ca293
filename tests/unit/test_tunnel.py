"""The doors that have no TLS of their own: who is let in, and who never reaches the service behind them."""

import contextlib
import datetime
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kdscale import tunnel
from kdscale.cluster.security import Authority
from kdscale.credentials import RUN_NAME, Keys
from kdscale.errors import PlacementError
from kdscale.tunnel import Entrance, Exit, listen, require_loopback

TOKEN = "t" * 64


class Echo:
    """A service on loopback that says everything back, and counts who came."""

    def __init__(self) -> None:
        self.listener = listen("127.0.0.1", 0)
        self.address: tuple[str, int] = self.listener.getsockname()
        self.guests = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                guest, _ = self.listener.accept()
            except OSError:
                return
            self.guests += 1
            threading.Thread(target=self._answer, args=(guest,), daemon=True).start()

    def _answer(self, guest: socket.socket) -> None:
        with guest:
            while said := guest.recv(1 << 16):
                guest.sendall(said)


class Doors:
    def __init__(self) -> None:
        self.authority = Authority()
        self.keys = Keys(self.authority.issue(), TOKEN)
        self.service = Echo()
        self.exit = Exit("127.0.0.1", 0, self.service.address, self.keys)

    def enter(self, keys: Keys | None = None, limit_s: float = 20.0) -> Entrance:
        return Entrance(self.exit.address, keys or Keys(self.authority.issue(), TOKEN), limit_s)


@pytest.fixture
def doors() -> Iterator[Doors]:
    doors = Doors()
    yield doors
    doors.exit.close()
    doors.service.listener.close()


def say(address: tuple[str, int], words: bytes) -> bytes:
    with socket.create_connection(address, 10) as connection:
        connection.sendall(words)
        heard = b""
        while len(heard) < len(words) and (part := connection.recv(1 << 16)):
            heard += part
    return heard


def test_what_is_said_arrives_whole_both_ways(doors: Doors):
    entrance = doors.enter()
    words = bytes(range(256)) * 40_000
    assert say(entrance.address, words) == words
    threads = [threading.Thread(target=say, args=(entrance.address, b"x" * 10_000)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    entrance.close()


def plain(address: tuple[str, int]) -> bytes:
    return say(address, TOKEN.encode() + b">hello")


def over_tls(*, certificate: bool) -> Callable[[tuple[str, int]], bytes]:
    def call(address: tuple[str, int]) -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if certificate:
            context = tunnel._context(ssl.PROTOCOL_TLS_CLIENT, Keys(Authority().issue(), TOKEN))
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection(address, 10) as raw, context.wrap_socket(raw, server_hostname=RUN_NAME) as guest:
            guest.sendall(TOKEN.encode() + b">hello")
            return guest.recv(100)

    return call


@pytest.mark.parametrize("knock", [plain, over_tls(certificate=False), over_tls(certificate=True)])
def test_strangers_do_not_reach_the_service(doors: Doors, knock: Callable[[tuple[str, int]], bytes]):
    """Plain, without a certificate, and with one of another run."""
    with contextlib.suppress(OSError):
        assert knock(doors.exit.address) == b""
    assert doors.service.guests == 0
    assert say(doors.enter().address, b"ours") == b"ours"


def test_keys_of_others_are_refused_by_name(doors: Doors):
    late = Keys(doors.authority.issue(datetime.timedelta(minutes=-1)), TOKEN)
    for keys in (late, Keys(doors.authority.issue(), "u" * 64), Keys(Authority().issue(), TOKEN)):
        with pytest.raises(PlacementError, match=r"does not let this rank in within 1 s: .*another run's or too old"):
            doors.enter(keys, 1.0)
    assert doors.service.guests == 0


def test_silent_and_many_connections_keep_nobody_out(doors: Doors, monkeypatch: pytest.MonkeyPatch):
    """A crowd that says nothing, larger than what may wait: ours get in at once, and the crowd is gone in time."""
    monkeypatch.setattr(tunnel, "_ADMIT_S", 5.0)
    crowd = [socket.create_connection(doors.exit.address, 10) for _ in range(4 * tunnel._WAITING)]
    began = time.monotonic()
    assert say(doors.enter().address, b"ours") == b"ours"
    assert time.monotonic() - began < 5, "it waited for the crowd to be sent away"
    assert doors.service.guests == 1
    for guest in crowd:
        guest.settimeout(20)
        with contextlib.suppress(ConnectionResetError):
            assert guest.recv(1) == b""
        guest.close()


def test_an_entrance_takes_its_own_process_alone(doors: Doors):
    entrance = doors.enter()
    guests = doors.service.guests
    code = f"import socket; print(socket.create_connection({entrance.address!r}, 5).recv(1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "b''" or "reset" in done.stderr
    assert doors.service.guests == guests
    assert say(entrance.address, b"ours") == b"ours"
    with socket.socket(socket.AF_INET6) as newer:
        newer.connect(("::ffff:127.0.0.1", entrance.address[1]))
        newer.sendall(b"ours")
        assert newer.recv(4) == b"ours"


def test_both_sides_see_the_end(doors: Doors):
    entrance = doors.enter()
    with socket.create_connection(entrance.address, 10) as connection:
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
        doors.service.listener.close()
        doors.exit.close()
        assert connection.recv(1) == b""
    with pytest.raises(PlacementError, match="does not let this rank in"):
        doors.enter()
    doors.exit = Exit("127.0.0.1", 0, doors.service.address, doors.keys)


def test_plain_listeners_stay_on_loopback():
    require_loopback("127.0.0.1")
    with pytest.raises(PlacementError, match=r"a listener on 10\.0\.0\.1 has no credentials"):
        require_loopback("10.0.0.1")
    with listen("127.0.0.1", 0) as taken, pytest.raises(PlacementError, match="cannot listen on"):
        listen(*taken.getsockname())


def test_keys_show_nothing():
    assert repr(Keys(Authority().issue(), TOKEN)) == "Keys(...)"
