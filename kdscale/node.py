"""What a rank meets on its node: its address in the run's network, and the environment its process gets."""

import contextlib
import ipaddress
import random
import socket

import psutil

from kdscale.errors import PlacementError

_SELDOM_TAKEN = range(20_000, 32_000)
"""Below the ports that Linux gives to who asks for any (32768 and up)."""


def address_in(network: str) -> tuple[str, str]:
    """This node's address in ``network`` (CIDR) and the name of its interface. Raises: PlacementError."""
    wanted = ipaddress.ip_network(network)
    for interface, addresses in psutil.net_if_addrs().items():
        for one in addresses:
            if one.family == socket.AF_INET and ipaddress.ip_address(one.address) in wanted:
                return one.address, interface
    raise PlacementError(f"no interface of {socket.gethostname()} has an address in stream.network = {network}")


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this node that nobody listens on, to be bound later: from a range that systems hand to nobody by chance.

    Raises: PlacementError when none was found.
    """
    for port in random.sample(_SELDOM_TAKEN, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise PlacementError(f"no free port on {host} among 100 from {_SELDOM_TAKEN.start} to {_SELDOM_TAKEN.stop - 1}")


def rank_environment(cpus_per_rank: int, gpus_per_rank: int) -> dict[str, str]:
    """Variables of a rank's process, whoever starts it."""
    variables = {
        # Spinning threads would take the cores of the other ranks on the node.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(cpus_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        # Deprecations inside the libraries are no news for users, nor is a progress bar from each rank.
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if not gpus_per_rank:
        variables["DS_ACCELERATOR"] = "cpu"
        # glibc hands large blocks back to the kernel at once and faults them in again at the next step, a fifth of a
        # step's time: keep them.
        variables |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_ARENA_MAX": "1"}
    return variables
