"""A Ray cluster to run on, joined or started, and placement groups with a limit on the wait."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from kdscale import log
from kdscale.cluster.daemons import watched
from kdscale.cluster.locked import require_locked
from kdscale.config.sections import ClusterSection, Placement
from kdscale.errors import PlacementError

_LOG = log.get(__name__)
_OBJECT_STORE_BYTES = 128 << 20  # nothing of ours travels through it
_REPORT_S = 10.0
_REACH_S = 5.0


@dataclass(frozen=True)
class Ask:
    """Resources of one process group: one bundle a rank."""

    what: str
    ranks: int
    cpus_per_rank: int
    gpus_per_rank: int
    placement: Placement = "pack"
    nodes: dict[str, str] = field(default_factory=dict)
    """Labels that a node must have to hold a rank."""


@contextmanager
def cluster(
    settings: ClusterSection, asks: list[Ask], temp_dir: str | None, lost: Callable[[PlacementError], None]
) -> Iterator[None]:
    """Join the cluster at ``settings.address``, or run a local one that ends with the context.

    A local cluster's logical CPUs are what the asks add up to: threads, not cores, are what ranks share on a laptop. Where it
    is lost, ``lost`` is told (see ``daemons``); a joined one may have other heads, and by itself Ray waits for them.

    Raises:
        PlacementError: no cluster at the address, or one that others can reach and that asks for no token.
    """
    # Logs of ours go to stderr of the driver; Ray's own usage reports leave no laptop of a user.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if settings.address is not None:
            _require_reachable(settings.address)
            ray.init(address=settings.address, log_to_driver=True)
        else:
            ray.init(
                address="local",
                num_cpus=sum(ask.ranks * ask.cpus_per_rank for ask in asks),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                _temp_dir=temp_dir,
                logging_level=logging.WARNING,
                log_to_driver=True,
                # Ray starts a worker for each CPU beforehand; ranks have environments of their own and would use none.
                _system_config={"prestart_worker_first_driver": False},
            )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise PlacementError(f"cannot join or start Ray (cluster.address = {settings.address}): {error}") from error
    _close_token_file()
    try:
        require_locked()
        with watched(lost) if settings.address is None else nullcontext():
            yield
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Ray retries a dead address for minutes; a plain connection tells at once. Raises: OSError, ValueError."""
    if address.startswith("ray://"):
        raise ValueError(
            "Ray Client (ray://) is not supported; submit the run with `ray job submit`, or name host:port"
        )
    host, separator, port = address.rpartition(":")
    if separator:
        socket.create_connection((host, int(port)), timeout=_REACH_S).close()


def _close_token_file() -> None:
    """Ray makes its token file readable by everybody on the machine; the token opens the cluster."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if path.is_file() and path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
        path.chmod(0o600)


@contextmanager
def reserve(ask: Ask, wait_seconds: float) -> Iterator[PlacementGroup]:
    """A placement group for ``ask``; names what is missing while it waits, and gives up in time.

    Raises:
        PlacementError: the cluster did not have the resources within ``wait_seconds``.
    """
    bundle = {"CPU": float(ask.cpus_per_rank)} | ({"GPU": float(ask.gpus_per_rank)} if ask.gpus_per_rank else {})
    selectors = [ask.nodes] * ask.ranks if ask.nodes else None
    group = placement_group([bundle] * ask.ranks, strategy=ask.placement.upper(), bundle_label_selector=selectors)
    deadline = time.monotonic() + wait_seconds
    try:
        while True:
            ready, _ = ray.wait([group.ready()], timeout=min(_REPORT_S, max(0.0, deadline - time.monotonic())))
            if ready:
                break
            lack = _lack(ask, bundle)
            if time.monotonic() >= deadline:
                raise PlacementError(
                    f"{ask.what} was not placed within cluster.wait_seconds = {wait_seconds:g}: {lack}; ask for less"
                    " (ranks, cpus_per_rank, gpus_per_rank, nodes) or add nodes"
                )
            _LOG.info("%s waits for its place: %s", ask.what, lack)
        yield group
    finally:
        remove_placement_group(group)


def _lack(ask: Ask, bundle: dict[str, float]) -> str:
    free = ray.available_resources()
    lack = ", ".join(
        f"needs {ask.ranks} x {amount:g} {name}, {free.get(name, 0.0):g} free of"
        f" {ray.cluster_resources().get(name, 0.0):g}"
        for name, amount in bundle.items()
    )
    if ask.nodes:
        there = [node["Labels"] for node in ray.nodes() if node["Alive"]]
        fitting = sum(all(_fits(labels, *one) for one in ask.nodes.items()) for labels in there)
        wanted = ", ".join(f"{name}={value}" for name, value in ask.nodes.items())
        lack += f", on nodes with {wanted}: {fitting} of {len(there)} nodes"
    return lack if ask.placement == "pack" else f"{lack}, placed by {ask.placement}"


def _fits(labels: dict[str, str], name: str, wanted: str) -> bool:
    """Whether a node's labels agree with one of Ray's label selectors: ``a``, ``!a``, ``in(a,b)`` or ``!in(a,b)``."""
    forbidden, wanted = wanted.startswith("!"), wanted.removeprefix("!")
    listed = wanted.removeprefix("in(").removesuffix(")").split(",") if wanted.startswith("in(") else [wanted]
    return (labels.get(name) in [one.strip() for one in listed]) != forbidden


def require_memory(needed_bytes: int, what: str) -> None:
    """Refuse to start what this machine cannot hold. Raises: PlacementError."""
    free = psutil.virtual_memory().available
    if needed_bytes > free:
        raise PlacementError(
            f"{what} needs about {needed_bytes / 2**30:.1f} GiB of memory; {free / 2**30:.1f} GiB are free here; use a"
            " smaller model, fewer ranks on this node, or a cluster (cluster.address)"
        )
