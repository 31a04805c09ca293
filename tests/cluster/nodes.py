"""Ray on three hosts of one machine, by the scripts that users start it with, and a job for them.

``head`` and ``second`` hold a teacher of two ranks, ``third`` the students; all doors are off loopback, and Ray has its own TLS.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kdscale.cluster.security import Authority
from tests.cluster import ray_tls
from tests.cluster.hosts import NETWORK, Host, hosts
from tests.failure.runs import ranks_of
from tests.runs import KDSCALE, OURS, finish, write_config


@dataclass
class Nodes:
    head: Host
    second: Host
    third: Host
    environment: dict[str, str]

    @property
    def all(self) -> list[Host]:
        return [self.head, self.second, self.third]

    def start(self, host: Host, *command: str, log: Path) -> "subprocess.Popen[bytes]":
        environment = os.environ | OURS | self.environment | host.environment
        with log.open("ab") as out:
            return subprocess.Popen(host.inside(*command), stdout=out, stderr=subprocess.STDOUT, env=environment)

    def script(self, host: Host, *command: str, log: Path) -> None:
        process = self.start(host, "bash", *command, log=log)
        assert finish(process, log, within_s=120) == 0, log.read_text()

    def ray(self, *command: str, scratch: Path) -> str:
        """What `ray COMMAND` says on the head."""
        said = scratch / "ray.log"
        # By itself Ray looks for clusters among all processes, and those of other tests may run.
        asked = [*command, "--address", "http://127.0.0.1:8265"]
        process = self.start(self.head, str(Path(sys.prefix) / "bin" / "ray"), *asked, log=said)
        assert finish(process, said, within_s=60) == 0, said.read_text()
        return said.read_text()

    def strangers(self, access: Path, scratch: Path) -> dict[str, Any]:
        """What strangers on the second host find, who have the run's secrets to compare with (``strangers.py``)."""
        said = scratch / "strangers.json"
        doors = [door for host in self.all for door in host.listening]
        process = self.start(
            self.second, sys.executable, "-m", "tests.cluster.strangers", str(access), *doors, log=said
        )
        assert finish(process, said, within_s=120) == 0, said.read_text()
        found: dict[str, Any] = json.loads(said.read_text().splitlines()[-1])
        return found

    def train(self, config: Path, *overrides: str, log: Path) -> "subprocess.Popen[bytes]":
        """`kdscale train` on the head."""
        return self.start(self.head, *KDSCALE, "train", str(config), *overrides, log=log)


def ranks(kind: str, *there: Host) -> list[psutil.Process]:
    """Living ranks of an actor class on these hosts."""
    return [one for one in ranks_of(kind) if any(host.holds(one.pid) for host in there)]


def processes(host: Host) -> list[psutil.Process]:
    return [one for one in psutil.process_iter() if host.holds(one.pid)]


@contextmanager
def three_nodes(scratch: Path) -> Iterator[Nodes]:
    log = scratch / "log"
    with ExitStack() as stack:
        head, second, third = stack.enter_context(hosts(3))
        token = {"KDSCALE_VENV": sys.prefix, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(scratch / "token")}
        nodes = Nodes(head, second, third, token)
        authority = Authority()
        for host, role in ((head, "teacher"), (second, "teacher"), (third, "student")):
            host.environment |= {"KDSCALE_CPUS": "2", "KDSCALE_LABELS": f"role={role}"}
            host.environment |= ray_tls.environment(authority, host.address, host.secrets)
            script = ["launch/ray_head.sh"] if host is head else ["launch/ray_worker.sh", f"{head.address}:6379"]
            stack.callback(nodes.script, host, script[0], "--stop", log=log)
            nodes.script(host, *script, log=log)
        yield nodes


def config_of(tmp_path: Path, teacher_dir: Path, text_dir: Path, nodes: Nodes, **sections: dict[str, Any]) -> Path:
    fields: dict[str, dict[str, Any]] = {
        "run": {"deterministic": True},
        "teacher": {
            "ranks": 2,
            "placement": "strict_spread",
            "nodes": {"role": "teacher"},
            "restart_wait_seconds": 0.2,
        },
        "student": {"parallel": {"data": 2}, "nodes": {"role": "!teacher"}},
        "train": {"steps": 40, "batch_rows": 4, "micro_rows": 2, "schedule": "constant"},
        "stream": {"network": NETWORK, "give_up_seconds": 60},
        "evaluate": {"quality": False},
        "cluster": {"address": f"{nodes.head.address}:6379"},
    }
    merged = {name: fields.get(name, {}) | sections.get(name, {}) for name in fields.keys() | sections.keys()}
    return write_config(tmp_path, teacher_dir, text_dir, **merged)
