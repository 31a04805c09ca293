"""Several hosts on one machine: network namespaces joined by a switch, each with a directory of its own for Ray.

The namespaces have no names: they end with the processes in them, and those that hold them end with the test, however that
ends. Nothing of this machine's own network is touched.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from tests.runs import OURS

ROOT = Path(__file__).parents[2]
NETWORK = "10.77.0.0/24"
# As /proc/net/tcp writes them.
_LISTEN, _LOOPBACK = "0A", "0100007F"
_TOOLS = ("ip", "tc", "mount", "nsenter", "unshare")


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    if absent := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(absent)} (packages iproute2 and util-linux)"
    with tempfile.TemporaryDirectory() as probe:
        trial = f"ip link add name probe type veth && ip link add type bridge && mount --bind {probe} {probe}"
        done = subprocess.run([*_UNSHARE, "sh", "-c", trial], capture_output=True, text=True, check=False)
    return f"needs to make network namespaces, as root: {done.stderr.strip()}" if done.returncode else ""


_UNSHARE = ["unshare", "--net", "--mount", "--propagation", "private"]


class Namespace:
    """Network and mounts of its own, for as long as the process lives that holds them."""

    def __init__(self, stack: ExitStack) -> None:
        self._holder = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", "echo here; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | OURS,
        )
        stack.callback(self._close)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"here\n"

    @property
    def pid(self) -> int:
        return self._holder.pid

    def holds(self, pid: int) -> bool:
        """Whether a process runs in here."""
        try:
            return os.readlink(f"/proc/{pid}/ns/net") == os.readlink(f"/proc/{self.pid}/ns/net")
        except OSError:
            return False

    def _close(self) -> None:
        for pid in psutil.pids():
            if pid != self.pid and self.holds(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        # What it waits for is this pipe's end, which comes too when the test is killed.
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.wait(timeout=10)
        self._holder.stdout.close()

    def inside(self, *command: str) -> list[str]:
        """``command`` as it is started in here."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", f"--wd={ROOT}", "--", *command]

    def do(self, command: str) -> None:
        for line in filter(None, map(str.strip, command.splitlines())):
            done = subprocess.run(self.inside(*line.split()), capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}: {done.stderr}"


class Host(Namespace):
    """A host with one network card, ``eth0``."""

    def __init__(self, number: int, switch: Namespace, ray_temp: Path, stack: ExitStack) -> None:
        super().__init__(stack)
        self.address = f"10.77.0.{number}"
        self._switch, self._port = switch, f"port{number}"
        switch.do(f"ip link add {self._port} type veth peer name eth0 netns {self.pid}")
        switch.do(f"ip link set {self._port} master switch up")
        self.do(
            f"""
            ip link set lo up
            ip address add {self.address}/24 dev eth0
            ip link set eth0 up
            ip route add default dev eth0
            """
        )
        self.files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdscale-host-")))
        """What Ray writes here."""
        self.secrets = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdscale-secrets-")))
        self.do(f"mount --bind {self.files} {ray_temp}")
        self.environment = {"KDSCALE_NODE_ADDRESS": self.address, "KDSCALE_RAY_TEMP": f"{ray_temp}/{number}"}

    @property
    def listening(self) -> list[str]:
        """``host:port`` of what others can connect to."""
        ports = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split()
                address, _, port = local.rpartition(":")
                if state == _LISTEN and not address.endswith(_LOOPBACK):
                    ports.add(int(port, 16))
        return [f"{self.address}:{port}" for port in sorted(ports)]

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Its cable is out of the switch meanwhile."""
        self._switch.do(f"ip link set {self._port} down")
        try:
            yield
        finally:
            self._switch.do(f"ip link set {self._port} up")

    @contextmanager
    def slowed_down(self, bytes_per_second: float) -> Iterator[None]:
        """What it is sent, it gets at this rate meanwhile."""
        rate = f"rate {bytes_per_second * 8:.0f}bit burst 32kb latency 200ms"
        self._switch.do(f"tc qdisc add dev {self._port} root tbf {rate}")
        try:
            yield
        finally:
            self._switch.do(f"tc qdisc del dev {self._port} root")


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    with ExitStack() as stack:
        # Ray's sockets lie below it, and the path of a Unix socket is short: all see it by one name, each has its own.
        ray_temp = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kdr-", dir="/tmp")))
        switch = Namespace(stack)
        switch.do("ip link add switch type bridge forward_delay 0")
        switch.do("ip link set switch up")
        yield [Host(number, switch, ray_temp, stack) for number in range(1, count + 1)]
