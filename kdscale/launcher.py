"""Student ranks of this host under the DeepSpeed launcher, supervised: its exit codes and its orphans are made right.

The launcher returns 0 when it is killed, and on SIGTERM leaves its ranks running. Here every rank tells how it ends, and is
asked to save and leave by the run's lifeline; what is alive after the grace is killed.
"""

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from kdscale import log
from kdscale.config import RunConfig
from kdscale.config.on_policy import require_none
from kdscale.errors import ConfigError, StudentError
from kdscale.node import address_in, free_port, rank_environment
from kdscale.roster import Roster
from kdscale.supervise import INTERRUPTED, Owned, Wish, listening, owned
from kdscale.topology import Topology

_LOG = log.get(__name__)
_POLL_S = 0.1
_HOST = re.compile(r"(\S+)\s+slots=(\d+)\s*(#.*)?")


@dataclass(frozen=True)
class Hosts:
    """The hosts that train together, and which of them this is."""

    slots: dict[str, int]
    """Ranks by host, in the order of their ranks."""
    here: int
    master: str
    """Address of the first host in ``stream.network``."""
    port: int

    @property
    def name(self) -> str:
        return list(self.slots)[self.here]


def alone(config: RunConfig, port: int) -> Hosts:
    """All ranks on this host. Port 0 is a free one. Raises: PlacementError."""
    address, _ = address_in(config.stream.network)
    if not port:
        port = free_port(address)
    return Hosts({address: _world(config)}, 0, address, port)


def among(config: RunConfig, hostfile: Path, here: int, master: str, port: int) -> Hosts:
    """Several hosts, by a file of lines ``HOST slots=N`` that is the same on all. Raises: ConfigError."""
    try:
        lines = [line.strip() for line in hostfile.read_text().splitlines()]
    except OSError as error:
        raise ConfigError(f"--hostfile {hostfile} cannot be read: {error}") from None
    slots: dict[str, int] = {}
    for line in lines:
        if not line or line.startswith("#"):
            continue
        found = _HOST.fullmatch(line)
        if found is None or found[1] in slots:
            raise ConfigError(f"--hostfile {hostfile}: {line!r} is not HOST slots=RANKS, with each host once")
        slots[found[1]] = int(found[2])
    if not 0 <= here < len(slots):
        raise ConfigError(f"--node_rank {here}: {hostfile} lists {len(slots)} hosts, numbered from 0")
    if sum(slots.values()) != _world(config):
        raise ConfigError(
            f"--hostfile {hostfile} has {sum(slots.values())} slots and student.parallel ="
            f" {config.student.parallel.model_dump()} needs {_world(config)} ranks; change one of them"
        )
    return Hosts(slots, here, master, port)


def _world(config: RunConfig) -> int:
    return Topology(config.student.parallel.pipeline, config.student.parallel.data).world


def visible_gpus(ranks: int, hosts: int, visible: str | None) -> list[int]:
    """GPUs of this host's ranks: of those that ``CUDA_VISIBLE_DEVICES`` names, which the launcher would overlook.

    Raises:
        ConfigError: too few, or names that the launcher cannot pass on.
    """
    first = list(range(ranks))
    if visible is None:
        return first
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if len(names) < ranks:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES = {visible!r} names {len(names)} GPUs for {ranks} ranks; name one a rank"
        )
    if not all(name.isdigit() for name in names):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES = {visible!r}: the DeepSpeed launcher takes numbers, not names, of GPUs"
        )
    chosen = [int(name) for name in names[:ranks]]
    if hosts > 1 and chosen != first:
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES = {visible!r}: on several hosts the DeepSpeed launcher takes GPUs 0 to {ranks - 1};"
            " unset it"
        )
    return chosen


def launch(
    config: RunConfig, config_file: Path, overrides: list[str], endpoints: Path, resume: str, hosts: Hosts
) -> int:
    """Train on this host's share of the ranks until all have ended; returns the run's exit code.

    SIGINT and SIGTERM let the ranks save and leave within ``cluster.grace_seconds``. When one fails or dies, the others get
    as long. Nothing of the run is left on this host.

    Raises:
        ConfigError: on_policy needs Ray.
        StudentError: a rank died without a word, or the launcher did.
        PlacementError: another process works on the same run on this host.
    """
    require_none(config.on_policy)
    directory = Path(config.run.dir) / config.run.name
    ranks = hosts.slots[hosts.name]
    gpus = list(range(ranks))
    if config.student.gpus_per_rank:
        gpus = visible_gpus(ranks, len(hosts.slots), os.environ.get("CUDA_VISIBLE_DEVICES"))
    variables = rank_environment(config.student.cpus_per_rank, config.student.gpus_per_rank)
    with owned(directory / f".launch-{hosts.here}.lock") as run, listening() as wish:
        command = [*_launcher(hosts, gpus, run.temp), "--config", str(config_file)]
        command += ["--teacher-endpoints", str(endpoints), "--resume", resume, *overrides]
        child = subprocess.Popen(command, env=run.environment | variables, start_new_session=True)
        roster = Roster(run.temp)
        lost = _watch(child, roster, run, wish, config.cluster.grace_seconds)
        roster.look()
        late, code = roster.alive, child.poll()
    if late:
        _LOG.warning("ranks %s did not leave within the grace; killed", [one.rank for one in late])
    return _verdict(roster, ranks, code, asked=wish.leave, lost=lost)


def _launcher(hosts: Hosts, gpus: list[int], temp: Path) -> list[str]:
    """``deepspeed`` up to the module's arguments. A hostfile for one host too: without it the launcher has the ranks meet at
    127.0.0.1, where rank 0 doesn't listen when ``stream.network`` is another."""
    hostfile = temp / "hosts"
    slots = hosts.slots if len(hosts.slots) > 1 else {hosts.name: max(gpus) + 1}
    hostfile.write_text("".join(f"{host} slots={number}\n" for host, number in slots.items()))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh"]
    command += ["--node_rank", str(hosts.here), "--master_addr", hosts.master, "--master_port", str(hosts.port)]
    if len(hosts.slots) == 1:
        command += ["--include", f"{hosts.name}:{','.join(map(str, gpus))}"]
    return [*command, "--log_level", "warning", "--module", "kdscale.worker"]


def _watch(child: "subprocess.Popen[bytes]", roster: Roster, run: Owned, wish: Wish, grace_s: float) -> bool:
    """Until all ranks have ended, or their time is over; returns whether the launcher died before them."""
    deadline: float | None = None
    lost = False
    while child.poll() is None or roster.alive:
        time.sleep(_POLL_S)
        roster.look()
        if deadline is not None:
            if time.monotonic() > deadline or wish.at_once:
                break
            continue
        # Without the launcher nobody would end the ranks: they are asked like by a signal.
        lost = child.poll() is not None and bool(roster.alive)
        if wish.leave or lost:
            run.let_go()
        if wish.leave or lost or roster.silent or roster.failed:
            deadline = time.monotonic() + grace_s + 1.0
            for one in roster.silent:
                _LOG.warning("student rank %d (pid %d) has died; the others get %g s", one.rank, one.pid, grace_s)
    return lost


def _verdict(roster: Roster, ranks: int, code: int | None, *, asked: bool, lost: bool) -> int:
    """The run's exit code. Raises: StudentError."""
    faults = [one.code for one in roster.failed if one.code != INTERRUPTED]
    if asked:
        return faults[0] if faults and faults[0] else INTERRUPTED
    if lost:
        raise StudentError(
            "the DeepSpeed launcher died before its ranks, which were asked to save; the same command goes on"
        )
    if roster.silent:
        names = ", ".join(f"{one.rank} (pid {one.pid})" for one in roster.silent)
        raise StudentError(
            f"student rank {names} died without a word, by a signal (SIGKILL where memory runs out); the newest checkpoint is"
            " whole, and the same command goes on from it"
        )
    if roster.failed:
        return faults[0] if faults and faults[0] else INTERRUPTED
    if code or len(roster.ranks) < ranks:
        raise StudentError(
            f"the DeepSpeed launcher ended by {code} when {len(roster.ranks)} of {ranks} ranks had started; its output is"
            " above"
        )
    return 0
